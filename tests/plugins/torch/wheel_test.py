#!/usr/bin/env python3
"""What a wheel holds: the package, libdattn.so and the libraries that it needs, found without anything of the system but glibc and
libstdc++, and with no compiler, MPI or CUDA in reach.

The files are those that `cmake --install --component python` gives for the build in DATTN_BUILD; with DATTN_SWEEP=full, those of a
wheel that pip builds from the tree, and the default wheel is installed into an environment of its own. Skipped (exit 77)
without build/venv."""
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
BUILD = os.environ.get("DATTN_BUILD", os.path.join(ROOT, "build", "release"))
PYTHON = os.path.join(ROOT, "build", "venv", "bin", "python")
FULL = os.environ.get("DATTN_SWEEP") == "full"
OF_THE_SYSTEM = r"ld-linux-x86-64\.so\.2|lib(c|m|dl|rt|pthread)\.so\.\d|libstdc\+\+\.so\.6|libgcc_s\.so\.1"

USE = """
import os, torch, dattn, dattn.torch
q = torch.randn(1, 37, 4, 16)
want = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3, is_causal=True).transpose(1, 2)
assert (dattn.torch.attention(q, q, q) - want).abs().max() < 1e-5
print(dattn.library_path())
for line in open("/proc/self/maps"):
    if ".so" in line: print(line.split()[-1])
"""

USE_JAX = """
import jax, dattn, dattn.jax
q = jax.random.normal(jax.random.key(0), (1, 37, 4, 16))
assert abs(dattn.jax.attention(q, q, q, mask="causal") - jax.nn.dot_product_attention(q, q, q, is_causal=True)).max() < 1e-5
print(dattn.library_path())
for line in open("/proc/self/maps"):
    if "libdattn" in line: print(line.split()[-1])
"""


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return result.stdout


def make_wheel(folder, *settings):
    run(PYTHON, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "-w", folder, *settings)
    (wheel,) = glob.glob(os.path.join(folder, "*.whl"))
    assert wheel.endswith("-py3-none-linux_x86_64.whl"), wheel
    return wheel


def site_of(python):
    return run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()


class WheelTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        site = os.path.join(cls.folder.name, "moved", "site")
        if FULL:
            wheel = make_wheel(os.path.join(cls.folder.name, "jax"), "--config-settings=build.targets=dattn_c;dattn_jax")
            run(PYTHON, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
        else:
            shutil.copytree(os.path.join(ROOT, "plugins", "python", "dattn"), os.path.join(site, "dattn"))
            first = os.path.join(cls.folder.name, "first")
            run("cmake", "--install", BUILD, "--component", "python", "--prefix", first)
            for file in glob.glob(os.path.join(first, "dattn", "*")):
                shutil.move(file, os.path.join(site, "dattn"))
        cls.package = os.path.join(site, "dattn")

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def libraries(self):
        return {os.path.basename(path): path for path in glob.glob(os.path.join(self.package, "*.so*"))}

    def test_every_needed_library_is_bundled_or_of_the_system(self):
        libraries = self.libraries()
        self.assertIn("libdattn.so.1", libraries)
        for name, path in libraries.items():
            self.assertFalse(os.path.islink(path), f"{name} is a link, which wheels cannot hold")
            dynamic = run("readelf", "-d", path)
            for needed in re.findall(r"NEEDED.*\[(.*)\]", dynamic):
                self.assertTrue(needed in libraries or re.fullmatch(OF_THE_SYSTEM, needed), f"{name} needs {needed}")
                self.assertNotRegex(needed, "mpi|cuda|nccl|torch")
        self.assertRegex(run("readelf", "-d", libraries["libdattn.so.1"]), r"PATH\).*\[\$ORIGIN\]")

    def test_the_licence_of_every_bundled_library_is_with_it(self):
        for name in self.libraries():
            if not name.startswith("libdattn"):
                with open(os.path.join(self.package, "licenses", name + ".txt"), encoding="utf-8") as file:
                    self.assertRegex(file.read(), "(?i)copyright|license", name)

    def test_one_libstdcxx_is_new_enough_for_all(self):
        """What is ours beside libdattn.so needs no newer one than that does."""
        newest = {}
        for name, path in self.libraries().items():
            versions = re.findall(r"GLIBCXX_([\d.]+)", run("readelf", "-V", path))
            newest[name] = max((tuple(map(int, version.split("."))) for version in versions), default=())
        for name in newest:
            if name.startswith("libdattn"):
                self.assertLessEqual(newest[name], newest["libdattn.so.1"], name)

    def test_it_runs_where_there_is_nothing_else(self):
        lines = run(PYTHON, "-c", USE, env={"PYTHONPATH": os.path.dirname(self.package), "PATH": "/nowhere"}).splitlines()
        self.assertEqual(lines[0], os.path.join(self.package, "libdattn.so.1"))
        torch_folder = os.path.realpath(os.path.join(ROOT, "build", "venv"))
        loaded = set(lines[1:])
        for name in self.libraries():
            if name not in ("libdattn_cuda.so", "libdattn_jax.so", "libgomp.so.1"):  # not used here; torch brings OpenMP too
                self.assertIn(os.path.join(self.package, name), loaded, f"{name} was taken from elsewhere")
        for path in loaded:
            self.assertNotRegex(os.path.basename(path), r"libmpi|libdattn_mpi")
            if os.path.basename(path) in self.libraries():
                self.assertTrue(path.startswith((self.package, torch_folder)), path)

    @unittest.skipUnless(FULL, "wheels are built with DATTN_SWEEP=full")
    def test_it_installs_into_a_virtual_environment(self):
        place = os.path.join(self.folder.name, "environment")
        run(PYTHON, "-m", "venv", place)
        python = os.path.join(place, "bin", "python")
        run(python, "-m", "pip", "install", "--no-index", "--no-deps", make_wheel(os.path.join(self.folder.name, "default")))
        with open(os.path.join(site_of(python), "torch.pth"), "w") as file:
            file.write(site_of(PYTHON))  # build/venv's PyTorch, not the dattn that its own .pth file names
        lines = run(python, "-c", USE, env={"PATH": "/nowhere"}, cwd=place).splitlines()
        self.assertEqual(lines[0], os.path.join(site_of(python), "dattn", "libdattn.so.1"))

    def test_jax_takes_its_custom_calls_from_the_package(self):
        if "libdattn_jax.so" not in self.libraries():
            self.skipTest("this wheel was built without jaxlib's headers")
        lines = run(PYTHON, "-c", USE_JAX, env={"PYTHONPATH": os.path.dirname(self.package), "PATH": "/nowhere",
                                                "JAX_PLATFORMS": "cpu"}).splitlines()
        self.assertEqual(set(lines), {os.path.join(self.package, name) for name in ("libdattn.so.1", "libdattn_jax.so")})


if __name__ == "__main__":
    if not os.path.exists(PYTHON) or subprocess.run([PYTHON, "-c", "import torch"], capture_output=True).returncode != 0:
        print("skipped: no build/venv with PyTorch; launch/setup.sh --python makes it")
        sys.exit(77)
    unittest.main()
