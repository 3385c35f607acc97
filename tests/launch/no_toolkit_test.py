#!/usr/bin/env python3
"""Where there is no CUDA toolkit, the build is made without the CUDA module, and with the stand-ins of its tests."""
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@unittest.skipUnless(shutil.which("ninja"), "no ninja")
class NoToolkit(unittest.TestCase):
    def test_the_build_has_no_cuda_module(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA")}
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DCMAKE_CUDA_COMPILER=NOTFOUND",
                        "-DCMAKE_IGNORE_PATH=/usr/local/cuda/include"], env=environment, check=True, capture_output=True, text=True)
        planned = subprocess.run(["ninja", "-C", folder, "-t", "commands", "all"], check=True, capture_output=True, text=True).stdout
        self.assertIn("-o bin/dattn ", planned)
        self.assertIn("libdattn_cuda_standin.so", planned)
        for word in ("nvcc", "libdattn_cuda.so", "/cuda/include"):
            self.assertNotIn(word, planned)


if __name__ == "__main__":
    unittest.main()
