#!/usr/bin/env python3
"""tests/conformance/rungs.py: what GoogleTest wrote becomes one row for each feature and one column for each rung."""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def suite(name, *tests):
    return {"name": name, "testsuite": [{"result": "COMPLETED", **test} for test in tests]}


class Rungs(unittest.TestCase):
    def test_table(self):
        reports = {
            "threads_0": [suite("Sweep/Conformance", {"name": "EqualsTheReference/ring_2_ranks", "cases": "30"})],
            "threads_1": [suite("Sweep/Conformance", {"name": "EqualsTheReference/ring_8_ranks", "cases": "12"}),
                          suite("Bytes", {"name": "Of", "cases": "500"}), suite("Planning", {"name": "Random"})],
            "nccl_2": [suite("Sweep/Conformance", {"name": "EqualsTheReference/all_gather_2_ranks", "cases": "9"},
                             {"name": "EqualsTheReference/ring_2_ranks", "cases": "30", "failures": [{}]}),
                       suite("Refusal", {"name": "Masks", "result": "SKIPPED"})]}
        with tempfile.TemporaryDirectory() as folder:
            for name, suites in reports.items():
                text = json.dumps({"timestamp": "2026-11-29T10:11:12Z", "testsuites": suites})
                (pathlib.Path(folder) / f"{name}.json").write_text(text)
            said = subprocess.run([sys.executable, ROOT / "tests/conformance/rungs.py", folder], capture_output=True, text=True, check=True)
        rows = [line.split() for line in said.stdout.splitlines()]
        self.assertEqual(rows[0], ["cases", "passed", "threads", "NCCL", "st.-in", "2", "real", "NCCL"])
        self.assertEqual(rows[1:4], [["all_gather", "-", "9", "a", "GPU"], ["ring", "42", "1", "FAILED", "a", "GPU"],
                                     ["bytes", "500", "-", "a", "GPU"]])
        self.assertEqual(rows[4], ["at", "(UTC)", "10:11", "10:11"])


if __name__ == "__main__":
    unittest.main()
