"""launch/fetch_austen.py on a small package made here: R's files written by hand, read back as one text."""

import gzip
import os
import struct
import subprocess
import sys
import tempfile
import unittest
import zlib

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "launch", "fetch_austen.py")
NOVELS = ["sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion"]
HEADER = b"X\n" + struct.pack(">iiii", 3, 0x40203, 0x30500, 5) + b"UTF-8"


def text(value):
    return struct.pack(">ii", 9, len(value)) + value.encode()


def strings(values):
    return struct.pack(">ii", 16, len(values)) + b"".join(text(value) for value in values)


def integers(values):
    return struct.pack(f">ii{len(values)}i", 13, len(values), *values)


def named_list(pairs):
    body = struct.pack(">ii", 19 | 1 << 9, len(pairs)) + b"".join(value for _, value in pairs)
    names = struct.pack(">ii", 2 | 1 << 10, 1) + text("names") + strings([name for name, _ in pairs])
    return body + names + struct.pack(">i", 254)


def write_package(folder, novels, damage=False):
    chunks, variables = b"", []
    for name in novels:
        plain = HEADER + strings([name.upper(), "", "It is a truth."])
        chunk = struct.pack(">I", len(plain)) + zlib.compress(plain)
        variables.append((name, integers([len(chunks), len(chunk)])))
        chunks += chunk
    if damage:
        chunks = chunks[:20] + bytes([chunks[20] ^ 1]) + chunks[21:]
    data = os.path.join(folder, "usr", "lib", "R", "data")
    os.makedirs(data)
    with open(os.path.join(data, "Rdata.rdx"), "wb") as file:
        file.write(gzip.compress(HEADER + named_list([("variables", named_list(variables))])))
    with open(os.path.join(data, "Rdata.rdb"), "wb") as file:
        file.write(chunks)


class FetchAusten(unittest.TestCase):
    def fetch(self, novels, damage=False):
        with tempfile.TemporaryDirectory() as folder:
            if novels:
                write_package(folder, novels, damage)
            out = os.path.join(folder, "out.txt")
            done = subprocess.run([sys.executable, SCRIPT, folder, out], capture_output=True, text=True)
            if not os.path.exists(out):
                return done, None
            with open(out, encoding="utf-8") as file:
                return done, file.read()

    def test_the_novels_in_their_order(self):
        done, novels = self.fetch(sorted(NOVELS))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(novels, "\n\n\n".join(f"{name.upper()}\n\nIt is a truth." for name in NOVELS) + "\n")

    def test_nothing_is_written_where_something_is_wrong(self):
        for novels, damage, message in [
            ([], False, "no Rdata.rdx"),
            (NOVELS[:-1], False, "no novel 'persuasion'"),
            (NOVELS, True, "rror"),
        ]:
            done, out = self.fetch(novels, damage)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(message, done.stderr)
            self.assertIsNone(out)


if __name__ == "__main__":
    unittest.main()
