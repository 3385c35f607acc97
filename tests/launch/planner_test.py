#!/usr/bin/env python3
"""mesh: {ranks: n}: dattn plan shapes the mesh and explains it; other commands run on the planned mesh."""
import json
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATTN = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release")) / "bin/dattn"
SHAPE = "shape: {batch: 1, seq: 131072, heads: 32, kv_heads: 8, dim: 128}\ndtype: bf16\n"


class Planner(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def run_dattn(self, command, config, *arguments, code=0):
        path = self.folder / "config.yaml"
        path.write_text(config)
        result = subprocess.run([DATTN, *command, path, *arguments], cwd=self.folder, capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, code, result.stderr)
        return result

    def plan(self, config):
        return json.loads(self.run_dattn(["plan"], config, "--json").stdout)

    def test_ranks_are_shaped(self):
        done = self.plan(SHAPE + "mesh: {ranks: 64}\n")
        self.assertEqual(done["mesh"]["ring"] * done["mesh"]["rows"] * done["mesh"]["ulysses"], 64)
        self.assertAlmostEqual(done["bytes_per_rank"]["forward"] / (131072 * 128 * 2), 2.84, places=2)
        self.assertAlmostEqual(done["ratio"], done["bytes_per_rank"]["forward"] / done["lower_bound_bytes"])
        self.assertLess(done["ratio"], 1.12)
        self.assertEqual(done["planned"]["chosen"]["bytes_per_rank"]["forward"], done["bytes_per_rank"]["forward"])
        self.assertEqual(done["planned"]["chosen"]["bytes_per_rank"]["backward"], done["bytes_per_rank"]["backward"])
        self.assertIn("only 32 query heads", done["rejected"][0]["why"])
        self.assertIsNone(done["time_s"])
        for key in ("strategy", "layout", "flops_per_rank", "balance", "peak_memory_bytes"):
            self.assertIn(key, done)

    def test_a_machine_gives_times(self):
        shutil.copy(ROOT / "configs/machines/h100_ib.yaml", self.folder / "machine.yaml")
        done = self.plan(SHAPE + "mesh: {ranks: 16}\nmachine: machine.yaml\n")
        self.assertGreater(done["time_s"], 0)
        self.assertEqual(done["time_by"], "simulation")
        self.assertEqual(done["planned"]["chosen"]["time_s"], done["time_s"])

    def test_a_given_mesh_stays_as_it_is(self):
        done = self.plan(SHAPE + "mesh: {ulysses: 2, ring: 4}\n")
        self.assertEqual((done["strategy"], done["layout"]), ("hybrid", "zigzag"))
        self.assertEqual({axis: size for axis, size in done["mesh"].items() if size > 1}, {"ulysses": 2, "ring": 4})
        self.assertEqual((done["planned"]["objective"], done["planned"]["chosen"]["strategy"]), ("bytes", "hybrid"))
        self.assertIn("no use for", next(one["why"] for one in done["rejected"] if one["what"] == "strategy ring"))

    def test_a_given_layout_stays_as_it_is(self):
        window = "attention: {mask: {kind: window, left: 100, right: 0}}\nmesh: {ring: 8}\n"
        self.assertEqual(self.plan(SHAPE + window)["layout"], "contiguous")
        self.assertEqual(self.plan(SHAPE + window + "layout: zigzag\n")["layout"], "zigzag")

    def test_a_named_strategy_stays_as_it_is(self):
        done = self.plan(SHAPE + "mesh: {ulysses: 2, ring: 4}\nstrategy: allgather\n")
        self.assertEqual(done["strategy"], "allgather")
        self.assertEqual(done["planner_prefers"]["chosen"]["strategy"], "hybrid")

    def test_a_run_takes_what_plan_shows(self):
        sizes = {"q": [1, 512, 4, 8], "k": [1, 512, 2, 8], "v": [1, 512, 2, 8]}
        header, offset = {}, 0
        for name, shape in sizes.items():
            length = 4 * shape[1] * shape[2] * shape[3]
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + length]}
            offset += length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (self.folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
        taken = set()
        for mask, more in (("causal", ""), ("window, left: 9, right: 3", ""), ("full", "layout: striped\n"),
                           ("window, left: 9, right: 3", "layout: balanced\n"), ("causal", "determinism: invariant\n")):
            config = (f"shape: {{seq: 512, heads: 4, kv_heads: 2, dim: 8}}\nmesh: {{ring: 4}}\nattention: {{mask: {{kind: {mask}}}}}\n"
                      + more)
            planned = self.plan(config)
            ran = json.loads(self.run_dattn(["attention"], config, "--in", "x.safetensors", "--out", "y.safetensors", "--ranks",
                                            "4", "--threads", "1", "--json").stdout.splitlines()[-1])
            for key in ("strategy", "layout", "mesh", "bytes_per_rank"):
                self.assertEqual(ran[key], planned[key], (config, key))
            taken.add((planned["strategy"], planned["layout"]))
        self.assertGreaterEqual(len(taken), 4, taken)

    def test_thousands_of_ranks(self):
        done = self.plan(SHAPE + "mesh: {ranks: 4096}\n")
        self.assertEqual(done["sampled_ranks"], 32)
        self.assertLess(done["planning_s"], 1)

    def test_the_text_explains(self):
        text = self.run_dattn(["plan"], SHAPE + "mesh: {ranks: 64}\n").stdout
        for part in ("planned\nby        bytes received\nbest ", "\nrunner-up ", "\nrefused   ulysses 64: ", "times the lower bound of "):
            self.assertIn(part, text)
        self.assertNotIn("rank 0: ", text)
        self.assertIn("rank 5: ", self.run_dattn(["plan"], SHAPE + "mesh: {ranks: 64}\n", "--rank", "5").stdout)

    def test_what_does_not_go_together(self):
        error = self.run_dattn(["plan"], SHAPE + "mesh: {ranks: 8, ring: 2}\n", code=2).stderr
        self.assertIn("stands in place of ulysses, rows and ring", error)
        error = self.run_dattn(["plan"], SHAPE + "mesh: {ranks: 8}\nobjective: time\n", code=2).stderr
        self.assertIn("give machine: FILE", error)
        self.run_dattn(["plan"], SHAPE + "mesh: {ranks: 6, tensor: 4}\n", code=2)

    def test_commands_run_on_the_planned_mesh(self):
        self.assertEqual(self.run_dattn(["mesh-ranks", "train"], "mesh: {ranks: 6}\n").stdout, "6\n")
        (self.folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
        config = ("mesh: {ranks: 4}\nmodel: {layers: 1, heads: 4, kv_heads: 2, dim: 32}\ndata: {path: text.txt}\n"
                  "train: {steps: 2, batch: 2, seq_len: 64, eval_batches: 1, sample_length: 4, out: run}\n")
        self.run_dattn(["train"], config, "--ranks", "4", "--threads", "1")
        kept = next(self.folder.glob("run*/config.yaml")).read_text()
        self.assertNotIn("ranks:", kept)
        self.assertRegex(kept, "(ulysses|rows|ring): [24]")


if __name__ == "__main__":
    unittest.main()
