#!/usr/bin/env python3
"""dattn plan --simulate: what it prints, the timelines it writes, and, where a chromium is, what the page shows."""
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
MACHINE = ROOT / "configs/machines/two_cpu_hosts.yaml"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class PlanSimulate(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def plan(self, *arguments, code=0):
        result = subprocess.run([DATTN, "plan", *arguments], cwd=self.folder, capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, code, result.stderr)
        return result

    def simulated(self, *arguments):
        return json.loads(self.plan(*arguments, "--json").stdout)["simulate"]

    def test_every_machine_simulates_every_mesh_that_fits(self):
        for machine in sorted((ROOT / "configs/machines").glob("*.yaml")):
            for mesh in ("node", "cluster", "tensor"):
                done = self.simulated(ROOT / f"configs/meshes/{mesh}.yaml", "--simulate", machine)
                self.assertEqual(done["machine"], machine.stem)
                self.assertGreater(done["forward"]["tflops_per_rank"], 0)
                self.assertLess(done["forward"]["time_s"], done["backward"]["time_s"])
                self.assertAlmostEqual(done["both"]["time_s"], done["forward"]["time_s"] + done["backward"]["time_s"])
                self.assertTrue(done["both"]["fits_memory"])

    def test_bytes_are_those_of_the_plan(self):
        done = json.loads(self.plan(ROOT / "configs/meshes/cluster.yaml", "--simulate", MACHINE, "--json").stdout)
        simulated = done["simulate"]["forward"]
        self.assertEqual(simulated["bytes_inside_node"] + simulated["bytes_between_nodes"],
                         done["bytes_per_rank"]["forward"] + done["stats_bytes"]["forward"])
        axes = simulated["axes"]
        self.assertEqual(set(axes), {axis for axis, size in done["mesh"].items() if size > 1 and axis not in ("data", "tensor")})
        self.assertAlmostEqual(sum(axis["bytes"] for axis in axes.values()),
                               simulated["bytes_inside_node"] + simulated["bytes_between_nodes"], delta=len(axes))
        for axis in axes.values():
            self.assertTrue(0 < axis["busiest_link_s"] <= simulated["time_s"], axis)
            self.assertGreaterEqual(axis["busiest_link_bytes"], axis["bytes"])

    def test_the_table(self):
        text = self.plan(ROOT / "configs/meshes/laptop.yaml", "--simulate", MACHINE).stdout
        self.assertIn("simulated on two_cpu_hosts: 4 ranks on 2 nodes\n", text)
        for row in ("time", "TFLOP/s per rank", "exposed communication, mean", "received from other nodes", "received over ring",
                    "  its busiest link carries", "  and is held", "peak memory"):
            self.assertRegex(text, rf"(?m)^{re.escape(row)} +\S+.*\S+.*\S+$")

    def test_a_machine_too_small(self):
        one_node, _ = (ROOT / "configs/machines/pcie_node.yaml").read_text().split("  between:")
        (self.folder / "node.yaml").write_text(one_node)
        result = self.plan(ROOT / "configs/meshes/cluster.yaml", "--simulate", self.folder / "node.yaml", code=2)
        self.assertIn("the mesh has 64 ranks but machine pcie_node is one node of 8", result.stderr)

    def test_options_that_need_others(self):
        self.plan(ROOT / "configs/meshes/laptop.yaml", "--timeline", "t", code=2)
        self.plan(ROOT / "configs/meshes/laptop.yaml", "--simulate", "missing.yaml", code=2)

    def timeline(self, *arguments):
        done = self.simulated(ROOT / "configs/meshes/laptop.yaml", "--simulate", MACHINE, "--timeline", "out", *arguments)
        self.assertEqual(done["timeline"], ["out.json", "out.html"])
        return json.loads((self.folder / "out.json").read_text())["traceEvents"], (self.folder / "out.html").read_text()

    def test_timelines_of_the_ranks_asked_for(self):
        for arguments, ranks in (((), {0, 1, 2, 3}), (("--timeline-ranks", "2"), {0, 1})):
            events, page = self.timeline(*arguments)
            self.assertEqual({event["pid"] for event in events}, ranks)
            self.assertNotRegex(page, "https?:")

    def test_a_calibrated_machine_simulates(self):
        machine = self.folder / "here.yaml"
        result = subprocess.run([DATTN, "doctor", "--ranks", "2", "--threads", "1", "--calibrate", machine, "--json"],
                                capture_output=True, text=True, timeout=300)
        self.assertEqual(result.returncode, 0, result.stderr)
        measured = json.loads(result.stdout.splitlines()[-1])["calibration"]["machine"]
        self.assertEqual(measured["ranks_per_node"], 2)
        self.assertGreater(measured["flops"]["fp32"], 1e8)
        self.assertGreater(measured["memory_bandwidth"], 1e8)
        self.assertGreater(measured["links"]["inside"]["bandwidth"], 1e7)
        self.assertLess(measured["links"]["inside"]["latency_s"], 0.1)
        config = self.folder / "two.yaml"
        config.write_text("mesh: {ring: 2}\nshape: {seq: 2048, heads: 4, dim: 64}\n")
        self.assertGreater(self.simulated(config, "--simulate", machine)["both"]["time_s"], 0)

    def test_calibration_needs_two_ranks(self):
        result = subprocess.run([DATTN, "doctor", "--calibrate", self.folder / "m.yaml"], capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, 2)
        self.assertIn("use --ranks 2", result.stderr)

    @unittest.skipUnless(CHROMIUM, "no chromium here")
    def test_the_page_draws_a_lane_for_every_rank(self):
        events, _ = self.timeline()
        page = (self.folder / "out.html").as_uri()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={self.folder / 'browser'}"]
        dom = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=120).stdout
        self.assertRegex(dom, r"<div>backward, received by a rank: [a-z_]+ [0-9.]+ [kMG]?B, busiest link [0-9.]+ %")
        self.assertEqual(re.findall(r'class="lane" data-rank="(\d+)"', dom), ["0", "1", "2", "3"])
        self.assertIn(f'<body data-drawn="{sum(event["ph"] == "X" for event in events)}">', dom)
        picture = self.folder / "page.png"
        subprocess.run([*command, f"--screenshot={picture}", page], capture_output=True, timeout=120, check=True)
        self.assertGreater(picture.stat().st_size, 2000)


if __name__ == "__main__":
    unittest.main()
