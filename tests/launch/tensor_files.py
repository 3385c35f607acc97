"""safetensors files for tests of commands, without further packages: tensors are (shape, list of numbers), fp32 or bf16."""
import array
import json
import math
import random
import struct


def normal(shape, seed):
    generator = random.Random(seed)
    return shape, [generator.gauss(0, 1) for _ in range(math.prod(shape))]


def write_file(path, tensors):
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * len(values)]}
        data += array.array("f", values).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def numbers(dtype, raw):
    if dtype == "F32":
        return list(array.array("f", raw))
    assert dtype == "BF16", dtype
    return list(array.array("f", array.array("I", [bits << 16 for bits in array.array("H", raw)]).tobytes()))


def read_file(path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    tensors = {}
    for name, entry in json.loads(raw[8:8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = (entry["shape"], numbers(entry["dtype"], raw[begin:end]))
    return tensors
