#!/usr/bin/env python3
"""launch/bundle.sh: the bundle of this build is small, may be moved, and works with nothing of the system but a shell and the C
library: where mount namespaces may be made, what it would have taken from the system is hidden from it."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release"))
LIMIT = 60_000_000  # bytes
# Of the system's: Open MPI's plugins and texts, and libraries by the beginning of their names.
HIDDEN_FOLDERS = ("openmpi", "pmix2")
HIDDEN_LIBRARIES = ("libmpi", "libopen-", "libpmix", "libhwloc", "libevent", "libdnnl", "libfmt", "libyaml-cpp", "libxxhash", "libgomp")
BARE = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}


def hiding(empty):
    """A command before another that hides the system's Open MPI and libraries from it (an empty folder, empty files in their place), or
    nothing where that is not allowed."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        return []
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    paths = [path for path in re.findall(r"=> (/\S+)$", listed, re.M) if pathlib.Path(path).name.startswith(HIDDEN_LIBRARIES)]
    real = sorted({str(pathlib.Path(path).resolve()) for path in paths})
    folders = sorted({str(pathlib.Path(path).parent / name) for path in real for name in HIDDEN_FOLDERS} | {"/usr/share/openmpi"})
    script = ["set -e; empty=$1; shift"]
    script += [f"mount --bind /dev/null {path}" for path in real]  # before folders that some of them are in
    script += [f'mount --bind "$empty" {folder}' for folder in folders if pathlib.Path(folder).is_dir()] + ['exec "$@"']
    return ["unshare", "-m", "bash", "-c", "\n".join(script), "bash", empty]


@unittest.skipUnless((BUILD / "bin/dattn").exists(), "nothing is built")
class Bundle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="dattn bundle "))
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        packed = cls.folder / "b.tar.gz"  # packed quickly; that it is small is asked of a slower packer's better result
        made = subprocess.run([ROOT / "launch/bundle.sh", "--out", packed], env={**os.environ, "DATTN_BUILD": str(BUILD)},
                              capture_output=True, text=True, timeout=300)
        cls.said = made.stderr
        assert packed.exists(), made.stderr
        cls.bytes = packed.stat().st_size
        print(f"bundle: {cls.bytes} bytes (gzip)")
        subprocess.run(["tar", "-C", cls.folder, "-xf", packed], check=True)
        packed.unlink()
        (cls.folder / "another place").mkdir()
        cls.root = (cls.folder / "dattn-bundle").rename(cls.folder / "another place/moved")
        (cls.folder / "empty").mkdir()
        cls.before = hiding(cls.folder / "empty")

    def bundled(self, *command, code=0, timeout=300, **variables):
        result = subprocess.run([*self.before, *command], env={**BARE, **variables}, cwd=self.folder, capture_output=True,
                                text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        self.assertEqual(result.returncode, code, result.stdout[-2000:] + result.stderr[-4000:])
        return result

    def test_is_small(self):
        self.assertLess(self.bytes, LIMIT)

    def test_nothing_is_looked_for_elsewhere(self):
        """Each library that a file of the bundle needs is in the bundle, or one of the C library's or the driver's."""
        release = self.root / "build/release"
        have = {path.name for path in release.rglob("*.so*")}
        for path in [*release.rglob("bin/*"), *release.rglob("*.so*")]:
            text = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
            for name in re.findall(r"\(NEEDED\).*\[(.+)\]", text):
                self.assertTrue(name in have or re.match(r"(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util))\.so", name), f"{path}: {name}")

    def test_doctor(self):
        done = json.loads(self.bundled(self.root / "dattn", "doctor", "--json").stdout.splitlines()[-1])
        self.assertTrue(done["self_test"])
        if (self.root / "build/release/lib/libdattn_mpi.so").exists():
            self.assertTrue(done["mpi"]["found"], done["mpi"])
        if (self.root / "build/release/lib/libdattn_cuda.so").exists():
            self.assertNotIn("cannot be loaded", json.dumps(done["cuda"]))

    def test_two_ranks_under_its_own_mpirun(self):
        if not (self.root / "build/release/openmpi").exists():
            self.skipTest("no Open MPI at build time")
        result = self.bundled("bash", "-c", '. "$0/env.sh"; mpirun -np 2 --oversubscribe --bind-to none dattn doctor --json', self.root,
                              OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        done = json.loads(result.stdout.splitlines()[-1])
        self.assertEqual((done["ranks"], done["launcher"]), (2, "openmpi"))
        self.assertIn("ring on ring 2", done["self_test"])

    def test_gpu_check_prints_its_commands(self):
        said = self.bundled(self.root / "launch/gpu_check.sh", "--dry-run", "--out", self.folder / "dry").stderr
        for step in ("doctor --json", "dattn_core_tests", "dattn_plugins_tests", "dattn_nccl_tests", "dattn_conformance_processes",
                     "dattn_cudnn_bench", "bench attention", "generate"):
            self.assertIn(step, said)
        self.assertNotIn("cmake", said)

    def check(self, *arguments, code=0):
        out = self.folder / "checked"
        self.bundled(self.root / "launch/gpu_check.sh", "--standin", "--out", out, *arguments, code=code, OMP_NUM_THREADS="1")
        return json.loads((out / "results.json").read_text()), (out / "report.md").read_text()

    def test_gpu_check_goes_on_where_it_was_cut(self):
        if not (self.root / "build/release/lib/libdattn_cuda_standin.so").exists():
            self.skipTest("no stand-ins are built")
        steps = "doctor,bench_product,training,curves"
        first, report = self.check("--only", "doctor")
        self.assertEqual([step["step"] for step in first["steps"]], ["doctor"])
        self.assertTrue(first["steps"][0]["result"]["cuda"]["found"])
        self.assertIn("stand-ins on host memory", report)
        cut, report = self.check("--only", steps, "--limit", "1", code=3)
        self.assertFalse(cut["complete"])
        self.assertIn("the time was up", report)
        done, report = self.check("--only", steps)
        self.assertTrue(done["complete"])
        self.assertEqual({step["step"]: step["exit"] for step in done["steps"]},
                         dict.fromkeys(("doctor", "training:cpu", "training:cuda", "curves", "bench_product"), 0))
        self.assertIn("| curves | 0 |", report)


if __name__ == "__main__":
    unittest.main()
