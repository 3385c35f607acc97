"""What libdattn.so exports: the symbols of plugins/c/symbols.txt and nothing else, those of version 1.0 among them;
and it is linked to no MPI, CUDA, NCCL or cuDNN, nor to what of its own it does not need."""
import os
import pathlib
import re
import subprocess
import unittest

SOURCE = pathlib.Path(__file__).resolve().parents[3]
LIBRARY = os.environ["DATTN_LIBRARY"]


def exported():
    lines = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], check=True, capture_output=True, text=True).stdout
    return sorted(line.split()[2] for line in lines.splitlines() if len(line.split()) == 3 and line.split()[1] in "TDBRW")


class Symbols(unittest.TestCase):
    def test_exports_are_the_committed_list(self):
        listed = (SOURCE / "plugins/c/symbols.txt").read_text().split()
        self.assertEqual(listed, sorted(listed))
        self.assertEqual(exported(), listed, "symbols.txt says what users may link to: add new symbols, never take one away")

    def test_programs_built_for_version_1_0_go_on_working(self):
        frozen = pathlib.Path(__file__).with_name("symbols_1_0.txt").read_text().split()  # never edited
        self.assertEqual(sorted(set(frozen) - set(exported())), [])

    def test_the_header_declares_each_of_them(self):
        header = (SOURCE / "plugins/c/dattn.h").read_text()
        declared = sorted(set(re.findall(r"DATTN_API [^;(]*?(dattn_\w+)\(", header)))
        self.assertEqual(declared, exported())

    def test_what_it_is_linked_to(self):
        dynamic = subprocess.run(["readelf", "-d", LIBRARY], check=True, capture_output=True, text=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        refused = [name for name in needed if re.match(r"lib(mpi|cuda|nccl|cudnn|cublas|dnnl|xxhash)", name)]
        self.assertEqual(refused, [])
        self.assertIn("libdattn.so.1", dynamic)


if __name__ == "__main__":
    unittest.main()
