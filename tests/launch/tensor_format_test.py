#!/usr/bin/env python3
"""`dattn attention` with every tensor_format: the same numbers as with bshd, bit for bit, in the axes of the format.

The command is found in DATTN_BUILD/bin."""
import itertools
import math
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

from tensor_files import normal, read_file, write_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATTN = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release")) / "bin/dattn"
ORDER = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3), "thd": (0, 1, 2, 3)}
MASK = "{kind: documents, cu_seqlens: [0, 3, 3, 9, 13], within: {kind: causal}}"


def permuted(tensor, order):
    """A row-major tensor with its axes in another order."""
    shape, values = tensor
    strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
    new_shape = [shape[axis] for axis in order]
    index = itertools.product(*(range(extent) for extent in new_shape))
    return new_shape, [values[sum(i * strides[axis] for i, axis in zip(place, order))] for place in index]


def formatted(tensor, name):
    shape, values = permuted(tensor, ORDER[name])
    return (shape[1:] if name == "thd" else shape), values


class TensorFormat(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def inputs(self, batch):
        shapes = {"q": [batch, 13, 4, 8], "k": [batch, 13, 2, 8], "v": [batch, 13, 2, 6], "dout": [batch, 13, 4, 6]}
        return {name: normal(shape, name) for name, shape in shapes.items()}

    def attend(self, tensors, tensor_format, mesh):
        write_file(self.folder / "x.safetensors", tensors)
        (self.folder / "c.yaml").write_text(f"attention: {{mask: {MASK}}}\nmesh: {mesh}\n" +
                                            (f"tensor_format: {tensor_format}\n" if tensor_format else ""))
        return subprocess.run([DATTN, "attention", "c.yaml", "--in", "x.safetensors", "--out", "y.safetensors", "--ranks", "4"],
                              cwd=self.folder, capture_output=True, text=True, timeout=60)

    def test_every_format_has_the_same_numbers(self):
        for tensor_format, mesh in itertools.product(ORDER, ("{ring: 2, ulysses: 2}", "{ring: 2, tensor: 2}")):
            with self.subTest(tensor_format=tensor_format, mesh=mesh):
                inputs = self.inputs(1 if tensor_format == "thd" else 3)
                result = self.attend(inputs, None, mesh)
                self.assertEqual(result.returncode, 0, result.stderr)
                want = read_file(self.folder / "y.safetensors")
                inputs = {name: formatted(tensor, tensor_format) for name, tensor in inputs.items()}
                result = self.attend(inputs, tensor_format, mesh)
                self.assertEqual(result.returncode, 0, result.stderr)
                got = read_file(self.folder / "y.safetensors")
                self.assertEqual(set(got), {"out", "lse", "dq", "dk", "dv"})
                for name in ("out", "dq", "dk", "dv"):
                    self.assertEqual(got[name], tuple(formatted(want[name], tensor_format)), name)
                    self.assertGreater(max(map(abs, got[name][1])), 0)
                shape, values = want["lse"]
                self.assertEqual(got["lse"], (shape[1:] if tensor_format == "thd" else shape, values))

    def test_wrong_axes_are_refused(self):
        result = self.attend(self.inputs(1), "thd", "{ring: 4}")
        self.assertEqual(result.returncode, 2)
        self.assertIn("tensor 'q' has shape [1, 13, 4, 8]; expected the axes [tokens, heads, dim] of tensor_format", result.stderr)
        result = self.attend(self.inputs(1), "bhds", "{ring: 4}")
        self.assertEqual(result.returncode, 2)
        self.assertIn("tensor_format", result.stderr)


if __name__ == "__main__":
    unittest.main()
