#!/usr/bin/env python3
"""`dattn attention` end to end: masks of each batch row on a data axis, score terms, unequal lengths and bf16 give what one
rank gives; determinism invariant gives the same bits, and is refused where processes compute by different instructions.

The command is found in DATTN_BUILD/bin."""
import itertools
import math
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import tempfile
import unittest

from tensor_files import normal, read_file, write_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATTN = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release")) / "bin/dattn"
BATCH, SEQ, SEQ_KV, HEADS, KV_HEADS, DIM, DIM_V = 4, 45, 61, 6, 3, 8, 6
PER_ROW = ("{kind: per_row, masks: [{kind: causal}, {kind: window, left: 4, right: 0}, {kind: prefix, length: 20},"
           " {kind: global, tokens: 3, window: {left: 2, right: 2}}]}")
PADDING = "{kind: padding, lengths: [45, 7, 30, 1], within: {kind: causal}}"


def relative_error(got, want):
    if any(math.isinf(w) and g != w for g, w in zip(got, want)):
        return math.inf
    pairs = [(g, w) for g, w in zip(got, want) if not math.isinf(w)]
    return math.sqrt(sum((g - w) ** 2 for g, w in pairs) / sum(w * w for _, w in pairs))


def inputs(seq_kv=SEQ):
    return {"q": normal([BATCH, SEQ, HEADS, DIM], 1), "k": normal([BATCH, seq_kv, KV_HEADS, DIM], 2),
            "v": normal([BATCH, seq_kv, KV_HEADS, DIM_V], 3), "dout": normal([BATCH, SEQ, HEADS, DIM_V], 4)}


class AttentionCommand(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def start(self, arguments=(), environment=None):
        files = ["c.yaml", "--in", "x.safetensors", "--out", "y.safetensors"]
        return subprocess.Popen([DATTN, "attention", *files, "--threads", "1", *arguments], cwd=self.folder, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})})

    def attend(self, config, mesh):
        """The tensors that the config gives on the mesh, and what is logged."""
        ranks = math.prod(mesh.values())
        axes = ", ".join(f"{axis}: {size}" for axis, size in mesh.items())
        (self.folder / "c.yaml").write_text(f"{config}mesh: {{{axes}}}\n")
        job = self.start(["--ranks", str(ranks)], {"DATTN_LOG": "debug"})
        _, errors = job.communicate(timeout=120)
        self.assertEqual(job.returncode, 0, errors)
        return read_file(self.folder / "y.safetensors"), errors

    def check(self, tensors, config, meshes, tolerance=2e-6):
        write_file(self.folder / "x.safetensors", tensors)
        want, _ = self.attend(config, {})
        for mesh in meshes:
            got, _ = self.attend(config, mesh)
            self.assertEqual(set(got), set(want))
            for name, (shape, values) in want.items():
                self.assertEqual(got[name][0], shape, (config, mesh, name))
                self.assertLess(relative_error(got[name][1], values), tolerance, (config, mesh, name))

    def test_masks_of_each_row_on_a_data_axis(self):
        for mask, layout in itertools.product((PER_ROW, PADDING), ("balanced", "zigzag")):
            self.check(inputs(), f"attention: {{mask: {mask}}}\nlayout: {layout}\n",
                       ({"data": 2, "ring": 2}, {"data": 3, "ulysses": 2}, {"data": 2, "tensor": 3}))

    def test_terms_and_unequal_lengths(self):
        slopes = [0.01 * head for head in range(HEADS)]
        terms = f"mask: {{kind: causal_bottom_right}}, softcap: 3, alibi_slopes: {slopes}, dropout: {{p: 0.2, seed: 5}}"
        for batch, heads in ((BATCH, HEADS), (1, HEADS), (BATCH, 1), (1, 1)):
            tensors = {**inputs(SEQ_KV), "bias": normal([batch, heads, SEQ, SEQ_KV], 5), "sink": normal([HEADS], 6)}
            self.check(tensors, f"attention: {{{terms}}}\n", ({"ring": 2, "ulysses": 2}, {"data": 2, "rows": 2}, {"tensor": 3}))

    def test_bf16(self):
        self.check(inputs(), f"attention: {{mask: {PADDING}}}\ndtype: bf16\n", ({"data": 2, "ring": 2}, {"ulysses": 3}), 1e-2)

    def test_invariant_bits_and_the_strategy_they_replace(self):
        config = f"attention: {{mask: {PER_ROW}, dropout: {{p: 0.1}}}}\ndeterminism: invariant\nstrategy: hybrid\n"
        write_file(self.folder / "x.safetensors", inputs())
        want, _ = self.attend(config, {})
        for mesh in ({"ring": 4, "ulysses": 2}, {"data": 2, "ring": 2, "ulysses": 2}):
            got, errors = self.attend(config, mesh)
            self.assertEqual(got, want)
            self.assertEqual(errors.count("determinism: invariant replaces strategy hybrid by its own"), 1, errors)

    def processes(self, config, environments):
        (self.folder / "c.yaml").write_text(config)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        jobs = []
        for rank, environment in enumerate(environments):
            names = {"RANK": rank, "WORLD_SIZE": len(environments), "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": len(environments),
                     "MASTER_ADDR": "localhost", "MASTER_PORT": port - 1}
            jobs.append(self.start(environment={**{name: str(value) for name, value in names.items()}, **environment}))
        return [(job.communicate(timeout=120)[1], job.returncode) for job in jobs]

    @unittest.skipUnless(platform.machine() == "x86_64", "one instruction set here")
    def test_other_instructions_are_refused_where_bits_are_promised(self):
        write_file(self.folder / "x.safetensors", inputs())
        for variable, words in (("DATTN_CPU=portable", ("the CPU kernel of rank 1", "portable, of rank 0", "DATTN_CPU=avx2")),
                                ("DNNL_MAX_CPU_ISA=SSE41", ("the instructions of matrix products of rank 1", "SSE41, of rank 0",
                                                            "DNNL_MAX_CPU_ISA=AVX2"))):
            other = [{}, dict([variable.split("=")])]
            ended = self.processes("mesh: {ring: 2}\ndeterminism: invariant\n", other)
            self.assertEqual([code for _, code in ended], [2, 2], ended)
            for word in words:
                self.assertIn(word, "".join(errors for errors, _ in ended))
            ended = self.processes("mesh: {ring: 2}\ndeterminism: repeatable\n", other)
            self.assertEqual([code for _, code in ended], [0, 0], ended)


if __name__ == "__main__":
    unittest.main()
