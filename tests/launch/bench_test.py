#!/usr/bin/env python3
"""dattn bench: what each command's `done` line holds, that a training step is the same on every mesh, and what is refused. No
times are compared: those are of tests/bench."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATTN = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release")) / "bin/dattn"
SMALL = [f"--set={key}" for key in ("train.batch=2", "train.seq_len=48", "model.layers=2", "model.dim=48", "model.heads=4",
                                    "model.hidden=64", "model.vocab=777", "model.dropout=0", "threads=1")]


def bench(*arguments):
    return subprocess.run([DATTN, "bench", *map(str, arguments), "--json"], capture_output=True, text=True, timeout=120)


class Bench(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def done(self, *arguments):
        result = bench(*arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        done = json.loads(result.stdout.splitlines()[-1])
        self.assertEqual(done["event"], "done")
        return done

    def refused(self, *arguments):
        result = bench(*arguments)
        self.assertEqual(result.returncode, 2, result.stdout)
        return result.stderr

    def assert_ascending(self, percentiles):
        self.assertEqual(list(percentiles), ["p20", "p50", "p80"])
        self.assertEqual(sorted(percentiles.values()), list(percentiles.values()))
        self.assertGreater(percentiles["p20"], 0)

    def test_attention_is_a_share_of_the_peak(self):
        shape = ("--seq", 192, "--heads", 2, "--dim", 32, "--repeat", 2, "--threads", 1, "--backward")
        one = self.done("attention", *shape)
        self.assertEqual(set(one), {"event", "ranks", "threads", "peak_gflops", "peak_gflops_before_after", "forward_gflops",
                                    "forward_of_peak", "backward_gflops", "backward_of_peak", "milliseconds", "bandwidth",
                                    "peak_memory_bytes"})
        self.assertEqual((one["ranks"], one["threads"]), (1, 1))
        self.assertGreaterEqual(one["peak_gflops"], max(one["peak_gflops_before_after"]))
        # causal: 192 * 193 / 2 pairs, 2 heads, 2 (32 + 32) forward and 2 (3 * 32 + 2 * 32) backward FLOPs each
        for phase, flops in (("forward", 128), ("backward", 320)):
            self.assert_ascending(one["milliseconds"][phase])
            self.assertTrue(0 < one[f"{phase}_of_peak"] < 1.5, one)
            self.assertAlmostEqual(one[f"{phase}_gflops"] * one["milliseconds"][phase]["p50"] * 1e6, 192 * 193 // 2 * 2 * flops,
                                   delta=1)
        self.assertGreater(one["bandwidth"]["memory_gbyte_per_s"], 0.1)
        self.assertAlmostEqual(one["bandwidth"]["of_memory"],
                               one["bandwidth"]["gbyte_per_s"] / one["bandwidth"]["memory_gbyte_per_s"])
        self.assertGreater(one["peak_memory_bytes"], 4 * 192 * 2 * 32 * 4)
        two = self.done("attention", *shape, "--ranks", 2, "--mesh", "ring=2", "--dtype", "bf16")
        self.assertEqual(two["ranks"], 2)

    def test_a_decode_step_reads_all_keys(self):
        one = self.done("attention", "--seq", 1, "--seq-kv", 500, "--heads", 4, "--kv-heads", 2, "--dim", 32, "--mask", "full",
                        "--repeat", 2)
        self.assertAlmostEqual(one["forward_gflops"] * one["milliseconds"]["forward"]["p50"] * 1e6, 500 * 4 * 128, delta=1)
        read = one["bandwidth"]["gbyte_per_s"] * one["milliseconds"]["forward"]["p50"] * 1e6
        self.assertAlmostEqual(read, 4 * (2 * 500 * 2 * 32 + 2 * 4 * 32), delta=1)  # k and v; q and out

    def test_train_takes_the_same_steps_on_every_mesh(self):
        config = ROOT / "configs/models/gpt2_124m.yaml"
        one = self.done("train", config, "--steps", 3, *SMALL)
        self.assertEqual(one["parameters"], (777 + 1024) * 48 + 2 * (4 * (48 * 48 + 48) + 2 * 48 * 64 + 64 + 48 + 4 * 48) + 2 * 48)
        self.assert_ascending(one["milliseconds"])
        self.assertGreater(one["of_peak"], 0)
        self.assertAlmostEqual(one["tokens_per_s"] * one["milliseconds"]["p50"], 2 * 48 * 1000, delta=1)
        self.assertEqual(one["bytes_sent"], 0)
        for mesh in ("ring: 2", "ulysses: 2", "data: 2", "tensor: 2"):
            shared = self.done("train", config, "--steps", 3, "--ranks", 2, f"--set=mesh={{{mesh}}}", *SMALL)
            self.assertAlmostEqual(shared["loss"], one["loss"], delta=1e-5 * one["loss"], msg=mesh)
            self.assertGreater(shared["bytes_sent"], 0)

    def test_comm_measures_the_axes_of_the_mesh(self):
        self.assertEqual(list(self.done("comm", "--ranks", 2, "--repeat", 2)["axes"]), ["job"])
        axes = self.done("comm", "--ranks", 4, "--repeat", 2, "--mesh", "ring=2,ulysses=2")["axes"]
        self.assertEqual(set(axes), {"ring", "ulysses"})
        for axis in axes.values():
            self.assertEqual(axis["size"], 2)
            self.assertGreater(axis["bandwidth"], 0)
            self.assertGreaterEqual(axis["latency_s"], 0)
            self.assertEqual([size["bytes"] for size in axis["sizes"]], [8**power for power in range(1, 9)])

    def test_comm_puts_the_links_into_a_machine_file(self):
        machine, config = self.folder / "machine.yaml", self.folder / "ring.yaml"
        machine.write_text((ROOT / "configs/machines/two_cpu_hosts.yaml").read_text())
        config.write_text("mesh: {ring: 2}\nshape: {seq: 4096, heads: 4, dim: 64}\n")
        done = self.done("comm", "--ranks", 2, "--repeat", 2, "--machine", machine)
        self.assertEqual(done["machine"], str(machine))
        job = done["axes"]["job"]
        self.assertFalse(job["between_hosts"])
        plan = subprocess.run([DATTN, "plan", config, "--simulate", machine, "--json"], capture_output=True, text=True, timeout=120)
        self.assertEqual(plan.returncode, 0, plan.stderr)
        ring = json.loads(plan.stdout)["simulate"]["forward"]["axes"]["ring"]
        self.assertAlmostEqual(ring["bytes"] / ring["busiest_link_s"] / job["bandwidth"], 1, delta=1e-3)
        text = machine.read_text()
        self.assertIn("Links measured by dattn bench comm with 2 ranks", text)
        self.assertEqual([float(number) for number in re.findall(r"node_bandwidth: ([\d.e+]+)", text)], [12.5e9])  # as it was

    def test_a_trace_shows_what_every_rank_did(self):
        trace = self.folder / "trace.json"
        self.done("attention", "--seq", 256, "--heads", 2, "--dim", 32, "--repeat", 2, "--threads", 1, "--backward", "--ranks", 2,
                  "--mesh", "ring=2", "--set", "strategy=ring", "--trace", trace)
        events = json.loads(trace.read_text())["traceEvents"]
        for rank in (0, 1):
            mine = [event for event in events if event["pid"] == rank]
            tracks = {event["tid"]: event["args"]["name"] for event in mine if event["name"] == "thread_name"}
            self.assertEqual(set(tracks.values()), {"work", "comm world", "comm ring", "exposed communication"})
            spans = [(tracks[event["tid"]], event["name"]) for event in mine if event["ph"] == "X"]
            self.assertEqual(spans.count(("work", "forward")), 3)  # one to warm up
            self.assertEqual(spans.count(("work", "backward")), 3)
            self.assertEqual(spans.count(("work", "attend")), 2 * 3)  # own keys, the other rank's
            self.assertEqual(spans.count(("work", "attend_grad")), 2 * 3)
            self.assertEqual(spans.count(("comm ring", "rotate")), spans.count(("exposed communication", "rotate")))
            self.assertGreaterEqual(spans.count(("comm ring", "rotate")), 2 * 3)
            sent = [event["args"]["sent"] for event in mine if tracks[event["tid"]] == "comm ring" and event["ph"] == "X"]
            self.assertEqual(sent[0], 2 * 128 * 2 * 32 * 4)  # k and v of 128 rows

    def test_a_training_step_can_be_traced(self):
        trace = self.folder / "trace.json"
        self.done("train", ROOT / "configs/models/gpt2_124m.yaml", "--steps", 1, "--ranks", 2, "--set=mesh={data: 2}", *SMALL,
                  "--trace", trace)
        names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
        self.assertTrue({"forward_backward", "update", "forward", "backward", "attend", "attend_grad"} < names, names)

    def test_product_counts_its_flops(self):
        product = self.done("product", "--size", 64, "--repeat", 2)
        self.assertAlmostEqual(product["gflops"] * product["milliseconds"]["p50"] * 1e6, 2 * 64**3, delta=1)

    def test_what_cannot_run_is_refused(self):
        self.assertIn("use --ranks 2 or mpirun -np 2", self.refused("comm"))
        self.assertIn("model.max_seq has 1024", self.refused("train", ROOT / "configs/models/gpt2_124m.yaml",
                                                             "--set", "train.seq_len=2048"))
        self.assertIn("no_such.yaml", self.refused("train", "no_such.yaml"))
        self.assertIn("mesh", self.refused("attention", "--mesh", "circle=2"))
        self.assertIn("no_such.yaml", self.refused("comm", "--ranks", 2, "--machine", "no_such.yaml"))


if __name__ == "__main__":
    unittest.main()
