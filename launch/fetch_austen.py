#!/usr/bin/env python3
"""The six novels of Jane Austen, as one plain text, from the Debian package r-cran-janeaustenr, without R.

usage: fetch_austen.py PACKAGE OUT.txt

PACKAGE is the .deb (dpkg must be present) or the folder it was unpacked to. R keeps the package's data in two files:
Rdata.rdx, the index (a gzip'd serialised list of name -> (offset, length)), and Rdata.rdb, the chunks (a 4-byte
big-endian length of the plain data, then a zlib stream of one serialised object).
Format: "R Internals", section 1.8 "Serialization Formats".
"""

import os
import struct
import subprocess
import sys
import tempfile
import zlib

NOVELS = ["sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion"]

NILVALUE, REFERENCE = 254, 255
SYMBOL, PAIRLIST, CHARACTERS, LOGICAL, INTEGER, REAL, STRINGS, LIST = 1, 2, 9, 10, 13, 14, 16, 19
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10
MOST_BYTES = 1 << 28


class Reader:
    """Reads one object of R's binary (XDR) serialisation: strings, numbers, lists and their attributes."""

    def __init__(self, data):
        self.data = data
        self.at = 0
        self.symbols = []
        if self.take(2) != b"X\n":
            raise ValueError("not R's binary serialisation")
        version, _writer, _oldest = self.integer(), self.integer(), self.integer()
        if version not in (2, 3):
            raise ValueError(f"serialisation version {version}; 2 and 3 are read")
        if version == 3:
            self.take(self.integer())  # the encoding's name

    def take(self, count):
        if count < 0 or self.at + count > len(self.data):
            raise ValueError(f"truncated: {count} bytes wanted at {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self):
        return struct.unpack(">i", self.take(4))[0]

    def item(self):
        flags = self.integer()
        kind = flags & 0xFF
        if kind == NILVALUE:
            return None
        if kind == REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == SYMBOL:
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == PAIRLIST:
            return self.pairlist(flags)
        if kind == CHARACTERS:
            count = self.integer()
            return None if count == -1 else self.take(count).decode("utf-8")
        value = self.vector(kind)
        if flags & HAS_ATTRIBUTES:
            names = (self.item() or {}).get("names")
            if names is not None and len(names) == len(value):
                return dict(zip(names, value))
        return value

    def pairlist(self, flags):
        pairs = {}
        while flags & 0xFF == PAIRLIST:
            if flags & HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & HAS_TAG else len(pairs)
            pairs[tag] = self.item()
            flags = self.integer()
        if flags & 0xFF != NILVALUE:
            raise ValueError("a pairlist without an end")
        return pairs

    def vector(self, kind):
        count = self.integer()
        if kind in (LOGICAL, INTEGER):
            return list(struct.unpack(f">{count}i", self.take(4 * count)))
        if kind == REAL:
            return list(struct.unpack(f">{count}d", self.take(8 * count)))
        if kind in (STRINGS, LIST):
            return [self.item() for _ in range(count)]
        raise ValueError(f"an object of type {kind}, which this reader does not know")


def inflate(data, window):
    """At most MOST_BYTES of a zlib (window 15) or gzip (31) stream."""
    stream = zlib.decompressobj(window)
    plain = stream.decompress(data, MOST_BYTES)
    if not stream.eof:
        raise ValueError("a damaged or oversized compressed stream")
    return plain


def find_data(folder):
    for parent, _, files in os.walk(folder):
        if "Rdata.rdx" in files and "Rdata.rdb" in files:
            return os.path.join(parent, "Rdata")
    sys.exit(f"{folder}: no Rdata.rdx and Rdata.rdb below it; unpack r-cran-janeaustenr there (dpkg -x)")


def read_novels(folder):
    base = find_data(folder)
    with open(base + ".rdx", "rb") as file:
        index = Reader(inflate(file.read(), 31)).item()["variables"]
    with open(base + ".rdb", "rb") as file:
        chunks = file.read()
    novels = []
    for name in NOVELS:
        if name not in index:
            sys.exit(f"{base}.rdx: no novel '{name}'; it holds {', '.join(sorted(index))}")
        offset, length = index[name]
        (size,) = struct.unpack(">I", chunks[offset : offset + 4])
        plain = inflate(chunks[offset + 4 : offset + length], 15)
        if len(plain) != size:
            raise ValueError(f"{base}.rdb: novel '{name}' has {len(plain)} bytes, its chunk states {size}")
        novels.append("\n".join(line or "" for line in Reader(plain).item()).strip("\n"))
    return novels


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    package, out = sys.argv[1:]
    with tempfile.TemporaryDirectory() as unpacked:
        if not os.path.isdir(package):
            subprocess.run(["dpkg", "-x", package, unpacked], check=True)
            package = unpacked
        text = "\n\n\n".join(read_novels(package)) + "\n"
    temporary = out + ".tmp"
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.replace(temporary, out)
    print(f"{out}: {len(text.encode('utf-8'))} bytes, {len(NOVELS)} novels", file=sys.stderr)


if __name__ == "__main__":
    main()
