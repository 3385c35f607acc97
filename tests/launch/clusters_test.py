#!/usr/bin/env python3
"""configs/clusters: every recipe is proved, simulated and fits the GPUs it is for; and what the scripts of launch/clusters start."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATTN = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release")) / "bin/dattn"
RECIPES = ROOT / "configs/clusters"
H100 = ROOT / "configs/machines/h100_ib.yaml"


class Recipes(unittest.TestCase):
    def plan(self, recipe, *arguments):
        result = subprocess.run([DATTN, "plan", RECIPES / f"{recipe}.yaml", "--simulate", H100, "--json", *arguments],
                                capture_output=True, text=True, timeout=300)
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)

    def test_all_are_proved_and_fit(self):
        names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
        self.assertEqual(len(names), 7, names)
        for name in names:
            with self.subTest(name):
                done = self.plan(name, "--verify")
                nodes = 1 if "_1x8_" in name else 8
                seq = 131072 if name.endswith("128k") else 1048576
                self.assertTrue(done["verified"])
                self.assertEqual((done["simulate"]["ranks"], done["simulate"]["nodes"]), (8 * nodes, nodes))
                self.assertGreater(done["verified_pairs"], seq * (seq + 1) // 2 - 1)
                self.assertTrue(done["simulate"]["both"]["fits_memory"])
                self.assertGreater(done["simulate"]["both"]["tflops_per_rank"], 100)
                self.assertEqual("training_memory" in done, name.startswith("train"))

    def test_what_training_holds(self):
        done = self.plan("train_7b_1x8_128k")["training_memory"]
        # 6.74 billion parameters over 4, at 8 bytes and 8 of AdamW's that two replicas share, and 2 for the copies in bf16 of all but
        # the token table (32,000 x 4,096 over 4) and the norms; 32 blocks keep their fp32 input: 131,072 rows over 8 ranks of 4,096
        # numbers.
        held = done["parameters_held"]
        self.assertAlmostEqual(held / (6.74e9 / 4), 1, delta=0.01)
        self.assertEqual(done["gradients_bytes"] + done["optimizer_bytes"], (4 + 8 // 2) * held)
        self.assertEqual(done["weights_bytes"], 4 * held + 2 * (held - 32000 * 4096 // 4 - 65 * 4096))
        self.assertEqual(done["activations_kept_bytes"], 32 * 131072 // 8 * 4096 * 4)
        self.assertTrue(done["fits_memory"])
        kept = self.plan("train_7b_1x8_128k", "--set", "train.recompute=none")["training_memory"]
        self.assertGreater(kept["activations_kept_bytes"], 5 * done["activations_kept_bytes"])
        self.assertFalse(kept["fits_memory"])

    def test_what_does_not_fit_is_said_with_the_remedy(self):
        for changes in (["train.seq_len=1048576"], ["train.recompute=none", "mesh.tensor=2", "mesh.ulysses=4"]):
            arguments = [word for change in changes for word in ("--set", change)]
            result = subprocess.run([DATTN, "plan", RECIPES / "train_7b_1x8_128k.yaml", "--simulate", H100, *arguments],
                                    capture_output=True, text=True, timeout=300)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertRegex(result.stdout, r"training holds .* GB on a rank: weights .*That does not fit: .*train.recompute=block")


# What srun, apptainer and mpirun were called with.
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"$STUB_LOG"
"""
DATTN_STUB = """#!/bin/bash
[[ $1 != mesh-ranks ]] || echo 64
"""


class Scripts(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dattn clusters "))
        self.addCleanup(shutil.rmtree, self.folder)
        for name, text in (("srun", STUB), ("mpirun", STUB), ("torchrun", STUB), ("build/release/bin/dattn", DATTN_STUB)):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)

    def calls(self, script, *arguments, code=0, **variables):
        environment = {"PATH": f"{self.folder}:{os.environ['PATH']}", "STUB_LOG": str(self.folder / "log"), **variables}
        result = subprocess.run(["bash", ROOT / "launch/clusters" / script, *arguments], env=environment, capture_output=True,
                                text=True, timeout=60)
        self.assertEqual(result.returncode, code, result.stderr)
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def test_a_task_for_each_gpu(self):
        doctor, train = self.calls("gpus.sbatch", "my.yaml", "--set", "train.steps=2", SLURM_SUBMIT_DIR=str(self.folder),
                                   SLURM_CPUS_PER_TASK="12", SLURM_JOB_NUM_NODES="3", SLURM_NTASKS="24")
        self.assertIn("--nodes=3 --ntasks=3 --ntasks-per-node=1", doctor)
        self.assertTrue(doctor.endswith("bin/dattn doctor --set device=cuda"), doctor)
        self.assertIn("--mpi=pmix --cpus-per-task=12 --kill-on-bad-exit=1", train)
        self.assertTrue(train.endswith("bin/dattn train my.yaml --set train.steps=2"), train)
        self.calls("gpus.sbatch", code=2)

    def test_in_a_container(self):
        train = self.calls("gpus.sbatch", "my.yaml", DATTN_IMAGE="dattn.sif")[-1]
        self.assertIn("apptainer exec --nv dattn.sif dattn train my.yaml", train)

    def test_mpirun_carries_the_settings_of_nccl(self):
        [line] = self.calls("mpirun.sh", "hosts", "my.yaml", DATTN_BUILD=str(self.folder / "build/release"), NCCL_DEBUG="WARN")
        self.assertIn("-np 64 --hostfile hosts", line)
        self.assertIn("-x NCCL_DEBUG", line)
        self.assertTrue(line.endswith("bin/dattn train my.yaml"), line)

    def test_torchrun_starts_the_ranks_of_the_mesh(self):
        [line] = self.calls("torchrun.sh", "my.yaml", DATTN_BUILD=str(self.folder / "build/release"), NODES="8", NODE="3", HEAD="node0")
        self.assertIn("--nnodes=8 --node-rank=3 --nproc-per-node=8 --master-addr=node0", line)
        self.assertTrue(line.endswith("bin/dattn train my.yaml"), line)

    def test_images_are_made_of_what_bundle_makes(self):
        for name in ("Dockerfile", "dattn.def"):
            text = (ROOT / "launch/clusters" / name).read_text()
            self.assertIn("dattn-bundle.tar.xz", text)
            self.assertIn("VIRTUAL_ENV=/opt/venv", text)
            for library in ("nvidia-nccl-cu13", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cuda-runtime"):  # cuDNN asks for the last
                self.assertIn(f" {library}", text)
        self.assertIn("build/dattn-bundle.tar.xz", (ROOT / "launch/bundle.sh").read_text())


if __name__ == "__main__":
    unittest.main()
