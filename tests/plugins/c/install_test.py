"""Installs the C interface, builds a project outside the tree against it with find_package and with pkg-config, runs it, and does
so once more after the installation was moved."""
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

SOURCE = pathlib.Path(__file__).resolve().parents[3]
BUILD = pathlib.Path(os.environ["DATTN_BUILD"])

CMAKE_PROJECT = """
cmake_minimum_required(VERSION 3.23)
project(consumer C)
find_package(dattn 1.0 REQUIRED)
find_package(Threads REQUIRED)
add_executable(consumer attention.c)
target_link_libraries(consumer PRIVATE dattn::dattn Threads::Threads m)
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Install(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.project = self.folder / "project"
        self.project.mkdir()
        shutil.copy(SOURCE / "plugins/c/examples/attention.c", self.project)
        (self.project / "CMakeLists.txt").write_text(CMAKE_PROJECT)

    def build_and_run(self, prefix, name):
        build = self.folder / name
        run("cmake", "-S", self.project, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
        run("cmake", "--build", build)
        self.assertIn("on one rank", run(build / "consumer"))

    def test_consumers(self):
        first, second = self.folder / "first", self.folder / "elsewhere/second"
        run("cmake", "--install", BUILD, "--component", "dattn", "--prefix", first)
        self.build_and_run(first, "one")
        second.parent.mkdir()
        first.rename(second)
        self.build_and_run(second, "two")
        with self.subTest("pkg-config"):
            if shutil.which("pkg-config") is None:
                self.skipTest("there is no pkg-config here")
            folder = next(second.rglob("dattn.pc")).parent
            environment = {**os.environ, "PKG_CONFIG_PATH": str(folder)}
            flags = run("pkg-config", "--cflags", "--libs", "dattn", env=environment).split()
            library = next(second.rglob("libdattn.so")).parent
            run("cc", "-std=c99", self.project / "attention.c", *flags, f"-Wl,-rpath,{library}", "-lm", "-lpthread", "-o",
                self.folder / "three")
            self.assertIn("on one rank", run(self.folder / "three"))


if __name__ == "__main__":
    unittest.main()
