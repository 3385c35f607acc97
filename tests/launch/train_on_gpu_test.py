#!/usr/bin/env python3
"""dattn train on CUDA devices, the stand-ins here: a run goes on where another kind of device left it, and ranks share a device."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release"))
STANDINS = {"DATTN_CUDA_MODULE": str(BUILD / "lib/libdattn_cuda_standin.so"), "DATTN_NCCL": str(BUILD / "lib/libnccl_standin.so"),
            "OMP_NUM_THREADS": "1"}
CONFIG = """
data: {path: text.txt}
model: {layers: 1, dim: 32, heads: 2, norm: rmsnorm, position: rope, activation: swiglu, bias: false}
train: {steps: 6, batch: 2, seq_len: 32, schedule: constant, warmup_steps: 0, eval_batches: 1, sample_length: 0}
"""


@unittest.skipUnless(pathlib.Path(STANDINS["DATTN_CUDA_MODULE"]).exists(), "no stand-ins are built")
class TrainOnGpu(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        (self.folder / "text.txt").write_text("It is a truth universally acknowledged. " * 60)
        (self.folder / "small.yaml").write_text(CONFIG)

    def train(self, out, *arguments, **variables):
        """The losses of the steps that the call makes, by step, and what it says."""
        result = subprocess.run([BUILD / "bin/dattn", "train", "small.yaml", "--json", "--set", f"train.out={out}", *arguments],
                                cwd=self.folder, env={**os.environ, **STANDINS, **variables}, capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, 0, result.stderr)
        events = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        return {event["step"]: event["loss"] for event in events if event["event"] == "step"}, result.stderr

    def assert_close(self, losses, expected, tolerance):
        self.assertEqual(sorted(losses), sorted(expected))
        for step, loss in losses.items():
            self.assertLess(abs(loss - expected[step]), tolerance, f"step {step}: {losses} and {expected}")

    def test_a_checkpoint_with_its_moments_goes_to_the_gpu_and_back(self):
        whole, _ = self.train("whole", "--set", "device=cpu")
        losses = {}
        for steps, device in ((2, "cpu"), (4, "cuda"), (6, "cpu")):
            resume = ["--resume"] if steps > 2 else []
            made, _ = self.train("parts", "--set", f"device={device}", "--set", f"train.steps={steps}", *resume)
            self.assertEqual(sorted(made), [steps - 1, steps])
            losses.update(made)
        self.assert_close(losses, whole, 1e-5)

    def test_tf32_reaches_attention_and_is_invariant_there_too(self):
        exact, said = self.train("exact", "--set", "device=cuda", DATTN_LOG="debug")
        self.assertIn("cuda attention, fp32, dims 16 and 16: plain", said)
        tf32 = ["--set", "device=cuda", "--set", "tf32=true", "--set", "determinism=invariant"]
        alone, said = self.train("tf32", *tf32, DATTN_LOG="debug")
        self.assertIn("cuda attention, fp32 rounded to TF32, dims 16 and 16: mma, dims to 64", said)
        self.assert_close(alone, exact, 1e-2)
        self.assertNotEqual(alone, exact)
        shared, _ = self.train("shared", *tf32, "--ranks", "2", "--set", "mesh.ring=2", "--set", "ranks_per_device=2",
                               DATTN_CUDA_STANDIN_DEVICES="1")
        self.assertEqual(shared, alone)

    def test_two_ranks_share_a_device(self):
        alone, _ = self.train("alone", "--set", "device=cpu")
        shared, said = self.train("shared", "--ranks", "2", "--set", "mesh.ring=2", "--set", "device=cuda", "--set", "ranks_per_device=2",
                                  DATTN_CUDA_STANDIN_DEVICES="1", DATTN_LOG="debug")
        self.assertIn("2 ranks on CUDA devices, some shared: tensors travel through host memory", said)
        self.assert_close(shared, alone, 1e-5)


if __name__ == "__main__":
    unittest.main()
