#!/usr/bin/env python3
"""What is wrong with a GPU, its driver or its libraries is said once, with the remedy, by the right exit code and in time, and so is
what is missing or can be had: on the stand-ins, which the environment makes fail."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("DATTN_BUILD", ROOT / "build/release"))
DATTN = BUILD / "bin/dattn"
STANDINS = {"DATTN_CUDA_MODULE": str(BUILD / "lib/libdattn_cuda_standin.so"), "DATTN_NCCL": str(BUILD / "lib/libnccl_standin.so"),
            "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
CONFIG = """
data: {path: text.txt}
model: {layers: 1, dim: 32, heads: 2, norm: rmsnorm, position: rope, activation: swiglu, bias: false}
train: {steps: 2, batch: 2, seq_len: 32, eval_batches: 1, sample_length: 0}
"""
BAD_INPUT, PEER, SYSTEM = 2, 3, 5


@unittest.skipUnless(pathlib.Path(STANDINS["DATTN_CUDA_MODULE"]).exists(), "no stand-ins are built")
class BadGpu(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        (self.folder / "text.txt").write_text("It is a truth universally acknowledged. " * 60)
        (self.folder / "small.yaml").write_text(CONFIG)

    def run_dattn(self, *arguments, code=0, before=(), **variables):
        result = subprocess.run([*before, DATTN, *arguments], cwd=self.folder, env={**os.environ, **STANDINS, **variables},
                                capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, code, result.stdout + result.stderr)
        return result

    def train(self, *sets, code=0, **more):
        words = [word for one in ("device=cuda", *sets) for word in ("--set", one)]
        return self.run_dattn("train", "small.yaml", *words, code=code, **more).stderr

    def two_ranks(self, code, transfers="auto", timeout=20, sets=(), **variables):
        words = [word for one in (f"comm.timeout_s={timeout}", f"comm.transfers={transfers}", *sets) for word in ("--set", one)]
        return self.run_dattn("train", "small.yaml", "--ranks", "2", "--set", "mesh.ring=2", "--set", "device=cuda", *words, code=code,
                              **variables).stderr

    def told_once(self, text, *parts):
        lines = [line for line in text.splitlines() if line.startswith("dattn: ") and "note" not in line]
        told = [line for line in lines if all(part in line for part in parts)]
        self.assertEqual(len(told), 1, text)

    def doctor(self, **variables):
        return json.loads(self.run_dattn("doctor", "--json", **variables).stdout.splitlines()[-1])

    def test_a_driver_that_is_too_old(self):
        cuda = self.doctor(DATTN_CUDA_STANDIN_DRIVER="12040")["cuda"]
        self.assertFalse(cuda["found"])
        self.assertEqual(cuda["detail"], "the NVIDIA driver is too old: it knows CUDA 12.4, this build needs CUDA 13.0; install driver 580 "
                                         "or newer, or build with an older toolkit")
        text = self.train(code=SYSTEM, DATTN_CUDA_STANDIN_DRIVER="12040")
        self.told_once(text, "device=cuda: the NVIDIA driver is too old", "use device=cpu")

    def test_no_driver(self):
        self.assertIn("there is no NVIDIA driver", self.doctor(DATTN_CUDA_STANDIN_DRIVER="0")["cuda"]["detail"])
        self.run_dattn("train", "small.yaml", DATTN_CUDA_STANDIN_DRIVER="0")  # device: auto takes the cpu

    def test_no_device(self):
        self.assertIn("sees no CUDA device", self.doctor(DATTN_CUDA_STANDIN_DEVICES="0")["cuda"]["detail"])

    def test_fewer_devices_than_ranks(self):
        text = self.two_ranks(BAD_INPUT, DATTN_CUDA_STANDIN_DEVICES="1")
        self.told_once(text, "2 ranks on this host, 1 to a device, need 2 CUDA devices; there are 1", "ranks_per_device=2")

    def test_a_compute_capability_without_code(self):
        devices = self.doctor(DATTN_CUDA_STANDIN_CAPABILITY="7.5")["cuda"]["devices"]
        self.assertIn("not usable: compute capability 7.5, and this build has code for 80,90a,100 only", devices[0])
        text = self.train(code=SYSTEM, DATTN_CUDA_STANDIN_CAPABILITY="7.5")
        self.told_once(text, "cuda:0", "compute capability 7.5", "DATTN_CUDA_ARCHITECTURES=75", "device=cpu")
        for capability in ("8.0", "8.6", "9.0", "12.0"):
            self.assertNotIn("not usable", self.doctor(DATTN_CUDA_STANDIN_CAPABILITY=capability)["cuda"]["devices"][0])

    def test_out_of_memory_says_what_was_planned(self):
        text = self.train(code=SYSTEM, DATTN_CUDA_STANDIN_MEMORY="200000")
        self.told_once(text, "out of memory on cuda:0", "training holds", "weights", "activations", "train.recompute=block")

    def test_out_of_memory_in_attention_says_what_was_planned(self):
        text = self.run_dattn("bench", "attention", "--seq", "512", "--heads", "8", "--dim", "64", "--set", "device=cuda", code=SYSTEM,
                              DATTN_CUDA_STANDIN_MEMORY="5000000").stderr
        self.told_once(text, "out of memory on cuda:0", "the forward pass of attention holds", "mesh.ring", "dtype=bf16")

    def test_out_of_memory_while_generating_says_what_the_cache_takes(self):
        folder = self.run_dattn("train", "small.yaml", "--set", "device=cpu").stdout.strip()
        text = self.run_dattn("generate", folder, "--prompt", "It is", "--set", "device=cuda", code=SYSTEM,
                              DATTN_CUDA_STANDIN_MEMORY="50000").stderr
        self.told_once(text, "out of memory on cuda:0", "keys and values of 32 positions take 8192 bytes", "mesh.tensor")

    def test_out_of_memory_on_one_rank_ends_all(self):
        text = self.unequal_ranks(SYSTEM, "[[ $OMPI_COMM_WORLD_RANK == 0 ]] || export DATTN_CUDA_STANDIN_MEMORY=200000;")
        self.told_once(text, "rank 1", "out of memory on cuda:1", "recomput")

    def test_errors_of_the_hardware_end_all_ranks(self):
        for fault, name, remedy in (("ecc 1 40", "cudaErrorECCUncorrectable", "Xid"), ("address 0 25", "cudaErrorIllegalAddress", "Xid")):
            for transfers in ("nccl", "staged"):
                with self.subTest(fault=fault, transfers=transfers):
                    text = self.two_ranks(SYSTEM, transfers, DATTN_CUDA_STANDIN_FAULT=fault)
                    self.told_once(text, f"cuda:{fault.split()[1]}", name, remedy)

    def test_errors_of_the_hardware_end_all_processes(self):
        if not shutil.which("mpirun") or not (BUILD / "lib/libdattn_mpi.so").exists():
            self.skipTest("no Open MPI")
        before = ["mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none"]
        text = self.train("mesh.ring=2", "comm.timeout_s=20", code=SYSTEM, before=before, DATTN_CUDA_STANDIN_FAULT="ecc 1 40")
        self.told_once(text, "cuda:1", "uncorrectable ECC error", "rank 1/2")

    def test_no_nccl(self):
        text = self.two_ranks(SYSTEM, "nccl", DATTN_NCCL="/nowhere/libnccl.so.2")
        self.told_once(text, "NCCL cannot be loaded", "/nowhere/libnccl.so.2", "nvidia-nccl-cu13")
        text = self.two_ranks(0, DATTN_NCCL="/nowhere/libnccl.so.2")  # auto
        self.told_once(text, "through host memory, slower than by NCCL", "/nowhere/libnccl.so.2", "install NCCL 2.19.0 or later")

    def test_no_cublaslt(self):
        missing = {"DATTN_CUBLASLT": "/nowhere/libcublasLt.so.13"}
        self.told_once(self.train(**missing), "plain kernel, much slower than cuBLASLt", "/nowhere/libcublasLt.so.13")
        self.assertIn("DATTN_CUBLASLT=/nowhere/libcublasLt.so.13 cannot be loaded", self.doctor(**missing)["cuda"]["matrix_products"])

    def test_no_cudnn(self):
        self.told_once(self.train("dtype=bf16"), "attention without cuDNN", "launch/setup.sh")
        for sets, variables in ((["dtype=fp32"], {}), (["dtype=bf16"], {"DATTN_KERNEL": "cuda"})):
            self.assertNotIn("cuDNN", self.train(*sets, **variables))

    def test_determinism_that_nobody_asked_for(self):
        self.told_once(self.two_ranks(0), "determinism is off", "determinism=repeatable")
        self.assertNotIn("determinism", self.train("determinism=repeatable"))

    def test_doctor_says_in_words_what_its_json_says(self):
        text = self.run_dattn("doctor", DATTN_CUDA_STANDIN_CAPABILITY="7.5").stdout
        for part in ("not usable: compute capability 7.5", "matrix_products", "determinism", "off unless the config asks for"):
            self.assertIn(part, text)
        text = self.run_dattn("doctor", DATTN_CUDA_STANDIN_DEVICES="0", DATTN_NCCL="/nowhere/libnccl.so.2",
                              DATTN_CUBLASLT="/nowhere/libcublasLt.so.13").stdout
        for part in ("sees no CUDA device", "/nowhere/libcublasLt.so.13", "install NCCL 2.19.0 or later (pip install nvidia-nccl-cu13)"):
            self.assertIn(part, text)

    def test_options_of_nccl(self):
        keys = [f"comm.nccl.{key}" for key in ("max_ctas=4", "zero_cta=true", "symmetric_bytes=5000", "register_buffers=true")]
        said = ("world: max_ctas 4, cta_policy 2", "window of 8192 bytes", "registers ")
        text, plain = (self.two_ranks(0, "nccl", sets=sets, NCCL_DEBUG="INFO") for sets in (keys, ()))
        for part in said:
            self.assertIn(part, text)
            self.assertNotIn(part, plain)
        for sets, version, *parts in ((["comm.nccl.ctas=4"], "22809", "comm.nccl.ctas"),
                                      (keys[1:2], "22809", "comm.nccl.zero_cta", "give symmetric_bytes"),
                                      (keys, "22709", "comm.nccl.zero_cta needs NCCL 2.28.0, but", "is 2.27.9"),
                                      (keys[2:3], "22609", "comm.nccl.symmetric_bytes needs NCCL 2.27.0, but", "is 2.26.9")):
            self.told_once(self.two_ranks(BAD_INPUT, "nccl", sets=sets, DATTN_NCCL_STANDIN_VERSION=version), *parts)

    def test_an_nccl_that_is_too_old(self):
        self.assertIn("is NCCL 2.8.3, but at least 2.19.0 is needed", self.doctor(DATTN_NCCL_STANDIN_VERSION="2803")["nccl"]["detail"])

    def test_a_cudnn_that_cannot_be_used(self):
        self.assertIn("DATTN_CUDNN=/nowhere/libcudnn.so.9 cannot be loaded", self.doctor(DATTN_CUDNN="/nowhere/libcudnn.so.9")["cudnn"]["detail"])
        old = str(self.folder / "libcudnn.so.9")
        subprocess.run(["c++", "-xc", "-shared", "-o", old, "-"], input="unsigned long cudnnGetVersion(void) { return 90100; }", text=True,
                       check=True)
        cudnn = self.doctor(DATTN_CUDNN=old)["cudnn"]
        self.assertFalse(cudnn["found"])
        self.assertIn(f"{old} has version 9.1.0; 9.19.0 or later is needed", cudnn["detail"])

    def unequal_ranks(self, code, differ, **variables):
        """What two processes say of which `differ`, words of a shell that know OMPI_COMM_WORLD_RANK, sets variables."""
        if not shutil.which("mpirun") or not (BUILD / "lib/libdattn_mpi.so").exists():
            self.skipTest("no Open MPI")
        rank = f"{DATTN} train small.yaml --set device=cuda --set mesh.ring=2 --set comm.transfers=nccl"
        before = ["mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none", "bash", "-c", f"{differ} exec {rank}"]
        result = subprocess.run(before, cwd=self.folder, env={**os.environ, **STANDINS, **variables}, capture_output=True, text=True,
                                timeout=120)
        self.assertEqual(result.returncode, code, result.stderr)
        return result.stderr

    def test_ranks_with_different_versions_of_nccl(self):
        text = self.unequal_ranks(BAD_INPUT, "DATTN_NCCL_STANDIN_VERSION=$((22800 + 100 * OMPI_COMM_WORLD_RANK))")
        self.told_once(text, "NCCL of rank 1", "2.29.0", "2.28.0", "install one version on all hosts")

    def test_ranks_with_different_versions_of_cudnn(self):
        module = {"DATTN_CUDA_MODULE": str(BUILD / "lib/libdattn_cudnn_standin.so")}
        differ = "DATTN_CUDNN_STANDIN_VERSION=9.$((19 + OMPI_COMM_WORLD_RANK)).0"
        text = self.unequal_ranks(BAD_INPUT, differ, **module)
        self.told_once(text, "cuDNN of rank 1", "9.20.0", "of rank 0", "9.19.0", "DATTN_CUDNN", "DATTN_KERNEL=cuda")
        self.unequal_ranks(0, differ, DATTN_KERNEL="cuda", **module)  # which does not ask for it

    def test_ranks_of_which_one_has_no_cudnn(self):
        module = "DATTN_CUDA_MODULE=$(ls {0}/lib/libdattn_cud{{a,nn}}_standin.so | sed -n $((OMPI_COMM_WORLD_RANK + 1))p)".format(BUILD)
        self.told_once(self.unequal_ranks(BAD_INPUT, module), "cuDNN of rank 1", ": 9.19.0, of rank 0", ": none", "DATTN_CUDNN")

    def test_ranks_with_different_cuda(self):
        text = self.unequal_ranks(BAD_INPUT, "DATTN_CUDA_STANDIN_RUNTIME=$((13000 - 910 * OMPI_COMM_WORLD_RANK))")
        self.told_once(text, "the CUDA runtime of rank 1", "12.9", "13.0", "one build of dattn")
        for differ, *said in (("DRIVER=$((13000 + 10 * OMPI_COMM_WORLD_RANK))", "CUDA of the driver of rank 1", "13.1, of rank 0"),
                              ("CAPABILITY=$((8 + OMPI_COMM_WORLD_RANK)).0", "the GPU of rank 1", "(compute capability 8.0); all wait")):
            text = self.unequal_ranks(0, "DATTN_CUDA_STANDIN_" + differ)  # told, and gone on
            for part in said:
                self.assertIn(part, text)

    def test_a_device_that_never_comes_to_rest_does_not_hold_the_process(self):
        text = self.two_ranks(PEER, "nccl", timeout=2, DATTN_NCCL_FAULT="hang 1 3 1000")
        self.assertIn("has not ended", text)


if __name__ == "__main__":
    unittest.main()
