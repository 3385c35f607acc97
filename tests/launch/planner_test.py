#!/usr/bin/env python3
"""mesh: {ranks: n}: dattn plan shapes the mesh and explains it; other commands run on the planned mesh."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

from tensor_files import write_file

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
        for batch in (1, 4):
            heads_of = {"q": 4, "k": 2, "v": 2}
            write_file(self.folder / f"{batch}.safetensors",
                       {name: ([batch, 512, heads, 8], [0] * (batch * 512 * heads * 8)) for name, heads in heads_of.items()})
        taken = set()
        lengths = "padding, lengths: [9, 500, 512, 40], within: {kind: causal}"
        for mask, batch, mesh, more in (("causal", 1, "ring: 4", ""), ("window, left: 9, right: 3", 1, "ring: 4", ""),
                                        ("full", 1, "ring: 4", "layout: striped\n"), ("causal", 4, "data: 2, ring: 2", ""),
                                        ("window, left: 9, right: 3", 1, "ring: 4", "layout: balanced\n"),
                                        ("causal", 1, "ring: 4", "determinism: invariant\n"),
                                        (lengths, 4, "data: 2, ranks: 4", "")):
            config = (f"shape: {{batch: {batch}, seq: 512, heads: 4, kv_heads: 2, dim: 8}}\nmesh: {{{mesh}}}\n"
                      f"attention: {{mask: {{kind: {mask}}}}}\n" + more)
            planned = self.plan(config)
            ran = json.loads(self.run_dattn(["attention"], config, "--in", f"{batch}.safetensors", "--out", "y.safetensors",
                                            "--ranks", "4", "--threads", "1", "--json").stdout.splitlines()[-1])
            for key in ("strategy", "layout", "mesh", "bytes_per_rank", "bytes_max", "peak_memory_bytes"):
                self.assertEqual(ran[key], planned[key], (config, key))
            taken.add((planned["strategy"], planned["layout"]))
        self.assertGreaterEqual(len(taken), 4, taken)

    def test_masks_of_another_batch_are_refused(self):
        config = "shape: {batch: 4, seq: 512}\nmesh: {data: 2}\nattention: {mask: {kind: padding, lengths: [1, 2, 3, 4, 5]}}\n"
        self.assertIn("5", self.run_dattn(["plan"], config, code=2).stderr)

    def test_ranks_that_receive_and_hold_most(self):
        done = self.plan("shape: {seq: 4096, heads: 4, kv_heads: 2, dim: 8}\nmesh: {ring: 4}\nobjective: bytes\n"
                         "strategy: fetch\nlayout: contiguous\n")
        block = 1024 * 2 * (8 + 8) * 4  # keys and values of a rank: the last one fetches three, a mean one half of that
        self.assertEqual(done["bytes_max"]["forward"], 3 * block)
        self.assertEqual(done["bytes_per_rank"]["forward"], 3 * block / 2)
        self.assertEqual(done["planned"]["chosen"]["peak_memory_bytes"], done["peak_memory_bytes"])
        self.assertGreater(done["peak_memory_bytes"], 4 * block)

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
