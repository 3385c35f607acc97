#!/usr/bin/env python3
"""What the built programs and libraries need to start: none of CUDA's libraries, which are loaded at run time or linked in."""
import os
import pathlib
import re
import subprocess
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release"))
REFUSED = re.compile(r"lib(cuda|cudart|nccl|cudnn\w*|cublas\w*|cufft\w*|nvrtc\w*|nvidia-ml)\.so")


def built_files():
    for folder in ("bin", "lib"):
        for path in sorted((BUILD / folder).iterdir()):
            if path.is_file() and not path.is_symlink() and path.read_bytes()[:4] == b"\x7fELF":
                yield path


def needed(path):
    text = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


class NeededLibraries(unittest.TestCase):
    def test_nothing_needs_a_library_of_cuda_to_start(self):
        files = list(built_files())
        self.assertTrue(files, f"nothing is built in {BUILD}")
        for path in files:
            libraries = needed(path)
            self.assertTrue(any(name.startswith("libc.so") for name in libraries), f"{path}: {libraries}")
            self.assertFalse([name for name in libraries if REFUSED.match(name)], path)


if __name__ == "__main__":
    unittest.main()
