#!/usr/bin/env python3
"""launch/gpu_check.sh with stand-ins for every program it starts: which steps it takes, keeps, repeats, and what it reports."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Answers as dattn would; STUB_FAILS names what fails, STUB_SLOW what takes 30 s.
DATTN = """#!/bin/bash
[[ $1 != --version ]] || { echo dattn 0; exit 0; }
echo "$*" >>"$STUB_LOG"
[[ " $* " != *" ${STUB_SLOW:-never} "* ]] || sleep 30
[[ " $* " != *" ${STUB_FAILS:-never} "* ]] || { echo 'it went wrong' >&2; exit 5; }
case "$1 $2" in
  doctor*) echo '{"event":"done","cuda":{"found":true,"detail":"4 device(s), driver 13.0"},"cudnn":{"found":true,"detail":"9.19.0 at x"},"nccl":{"found":'${STUB_NCCL:-true}',"detail":"2.28.9"},"strategies":["ring","tree"]}' ;;
  train*) printf '{"event":"step","step":1,"loss":5.5}\\n{"event":"step","step":2,"loss":'
          [[ $* == *ring=2* ]] && STUB_LOSS=${STUB_SHARDED_LOSS:-$STUB_LOSS}
          [[ $* == *device=cuda* ]] && echo "${STUB_LOSS:-5.251}}" || echo '5.25}'
          echo '{"event":"done","tokens_per_s":1234}' ;;
  "bench attention") echo '{"event":"done","forward_gflops":300000,"backward_gflops":250000}' ;;
  "bench train") echo '{"event":"done","tokens_per_s":4321}' ;;
  "bench product") [[ $* != *--repeat* ]] || sleep 0.3  # while the clock is sampled
                   echo '{"event":"done","gflops":600000}' ;;
  generate*) [[ $* == *--no-graphs ]] || STUB_TEXT=
             echo '{"event":"done","text":"a \\"b\\" c'$STUB_TEXT'","tokens_per_s":99}' ;;
esac
"""
BENCH = '#!/bin/bash\necho "raw $*" >>"$STUB_LOG"\necho \'{"forward_gflops":320000,"backward_gflops":250000}\'\n'
SMI = """#!/bin/bash
[[ $* == *clocks.sm* ]] || { echo 'H100, 580, 1980 MHz, 80 GiB'; exit 0; }
printf '345, 80.1\\n1755, 690.5\\n1745, 688.0\\n'
"""
OTHER = '#!/bin/bash\necho "$(basename "$0") $*" >>"$STUB_LOG"\n'
MPIRUN = '#!/bin/bash\nwhile [[ $1 != env ]]; do shift; done\nexec "$@"\n'


class GpuCheck(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dattn check "))
        self.addCleanup(shutil.rmtree, self.folder)
        programs = {"build/bin/dattn": DATTN, "path/mpirun": MPIRUN, "path/nvidia-smi": SMI,
                    "path/python3": "#!/bin/bash\nexit 1\n", "build/bin/dattn_cudnn_bench": BENCH}
        for name in ("dattn_core_tests", "dattn_plugins_tests", "dattn_nccl_tests", "dattn_conformance_tests", "dattn_conformance_processes"):
            programs[f"build/bin/{name}"] = OTHER
        for place, text in programs.items():
            path = self.folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def check(self, *arguments, code=0, quick=True, **variables):
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        environment = {**os.environ, "DATTN_BUILD": str(self.folder / "build"), "STUB_LOG": str(log),
                       "DATTN_PYTHON": str(self.folder / "path/python3"),
                       "PATH": f"{self.folder / 'path'}:{os.environ['PATH']}", **variables}
        result = subprocess.run([ROOT / "launch/gpu_check.sh", *["--quick"][:quick], "--out", self.folder / "out", *arguments], env=environment,
                                capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        self.assertEqual(result.returncode, code, result.stderr)
        return log.read_text().splitlines() if log.exists() else [], result

    def results(self):
        done = json.loads((self.folder / "out/results.json").read_text())
        return done, {step["step"]: step for step in done["steps"]}

    def test_everything_once_and_then_nothing_again(self):
        calls, result = self.check()
        done, steps = self.results()
        self.assertTrue(done["complete"])
        self.assertEqual({step["exit"] for step in done["steps"]}, {0})
        for name in ("doctor", "kernels", "layers", "generation", "nccl", "conformance_1", "conformance_threads:ring",
                     "conformance_nccl:2,ring", "conformance_nccl:4,others", "determinism", "determinism:meshes", "training:cpu",
                     "training:cuda", "curves", "training_invariant:2", "same_bits", "bench_product", "clocks",
                     "raw_cudnn:512,128,full", "bench_attention:2048,128,causal", "bench_attention:512,128,full,cuda",
                     "bench_fp32:2048,128,full", "bench_fp32:2048,128,causal,tf32", "bench_virtual_ranks:ring=4", "decode", "decode:no_graphs", "same_text", "gpt2"):
            self.assertIn(name, steps)
        self.assertEqual(steps["curves"]["result"], {"steps": 2, "largest_difference": 0.001, "tolerance": 0.01})
        self.assertIn("- GPU: H100, 580", result.stdout)
        self.assertIn("- CUDA: 4 device(s), driver 13.0\n- cuDNN: 9.19.0 at x\n- NCCL: 2.28.9\n"
                      "- SM clock under load: 1750 MHz at 690 W", result.stdout)
        self.assertIn("| 512,128,full | forward | 300.0 | 0.938 |  |  | 0.500 | 300.0 | 1.000 |", result.stdout)
        self.assertIn("| 2048,128,causal | backward | 250.0 | 250.0 | 1.000 |", result.stdout)
        self.assertIn("- decode: 99 tokens/s, 99 without graphs\n- training, GPT-2 124M: 4321 tokens/s", result.stdout)
        again, _ = self.check()
        self.assertEqual(again, [])
        chosen, _ = self.check("--only", "decode,bench_product")
        self.assertEqual(len(chosen), 3, chosen)

    def test_each_rank_has_a_device_where_there_are_enough(self):
        _, result = self.check("--dry-run")
        self.assertIn("DATTN_TEST_RANKS_PER_DEVICE=64", result.stderr)  # not known before doctor has run
        self.check("--only", "doctor")
        self.assertIn("DATTN_TEST_RANKS_PER_DEVICE=1 ", self.check("--dry-run")[1].stderr)

    def test_all_strategies_that_doctor_lists(self):
        self.check("--only", "doctor")
        said = self.check("--dry-run", quick=False)[1].stderr
        for words in ("tree_2_ranks", "ring_8_ranks", "/tree_4_ranks", "--seq 16384"):
            self.assertIn(words, said)
        self.assertNotIn("ulysses_2_ranks", said)

    def test_a_dry_run_alone_lists_everything(self):
        calls, result = self.check("--dry-run", quick=False)
        self.assertEqual(calls, ["doctor --json --set device=cpu"])
        for words in ("/tree_2_ranks", "dattn_nccl_tests", "dattn_cudnn_bench", "gpu_torch.py 512 1024"):
            self.assertIn(words, result.stderr)
        self.assertEqual(self.check()[0][0], "doctor --json --set device=cuda")  # nothing was taken for done

    def test_another_text_without_graphs_fails(self):
        self.check(code=1, STUB_TEXT="!")
        self.assertEqual(self.results()[1]["same_text"]["result"], {"texts": 2, "same": False})

    def test_a_step_that_fails_is_told_and_taken_again(self):
        _, result = self.check(code=1, STUB_FAILS="generate")
        self.assertIn("step decode failed (5)", result.stderr)
        self.assertIn("it went wrong", result.stderr)
        self.assertEqual(self.results()[1]["decode"]["exit"], 5)
        calls, result = self.check()
        self.assertEqual([call.split()[0] for call in calls], ["generate"] * 2)
        self.assertEqual(self.results()[1]["decode"]["exit"], 0)
        self.assertIn(", 0 failed", result.stdout)

    def test_curves_that_part_fail(self):
        self.check(code=1, STUB_LOSS="5.4")
        self.assertEqual(self.results()[1]["curves"]["exit"], 1)

    def test_invariant_losses_have_the_same_bits(self):
        self.check(code=1, STUB_SHARDED_LOSS="5.25100001")
        steps = self.results()[1]
        self.assertEqual((steps["same_bits"]["exit"], steps["curves"]["exit"]), (1, 0))
        self.assertEqual(steps["same_bits"]["result"]["tolerance"], 0)

    def test_goes_on_where_the_time_was_up(self):
        before, result = self.check("--limit", "4", code=3, STUB_SLOW="product")
        self.assertIn("4 s are over; call again to go on", result.stderr)
        done, steps = self.results()
        self.assertFalse(done["complete"])
        self.assertIn("curves", steps)
        self.assertNotIn("bench_product", steps)  # it was cut, not failed
        after, _ = self.check()
        self.assertEqual(after[0].split()[:2], ["bench", "product"])
        self.assertTrue(self.results()[0]["complete"])

    def test_without_nccl_its_steps_are_absent_not_failed(self):
        self.check(STUB_NCCL="false")
        self.assertEqual(self.results()[1]["conformance_nccl"]["result"], {"absent": "no NCCL: see doctor"})
        self.assertEqual(self.results()[1]["nccl"]["exit"], 0)

    def test_without_cudnn_its_steps_are_absent_not_failed(self):
        (self.folder / "build/bin/dattn_cudnn_bench").unlink()
        self.check()
        self.assertEqual(self.results()[1]["raw_cudnn"]["result"], {"absent": "built without cuDNN"})

    def test_bad_options(self):
        for arguments in (("--limit", "soon"), ("--out",), ("--fast",)):
            self.check(*arguments, code=2)


if __name__ == "__main__":
    unittest.main()
