#!/usr/bin/env python3
"""launch/run with a stand-in for the dattn command and for mpirun: which processes it starts, and what it returns; launch/test
with stand-ins for CMake's commands: what it says."""
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DATTN_")

# Says how it was called; mesh-ranks answers from the environment.
DATTN = """#!/bin/bash
if [[ $1 == mesh-ranks ]]; then
  [[ -n ${STUB_RANKS:-} ]] || { echo 'broken.yaml:1:1: unknown key' >&2; exit 2; }
  echo "$STUB_RANKS"; exit 0
fi
echo "dattn${STUB_UNDER:-} in $PWD: $*"
exit ${STUB_EXIT:-0}
"""
MPIRUN = """#!/bin/bash
echo "mpirun $*" >"$STUB_LOG"
[[ -z ${STUB_SIGNAL:-} ]] || exit $((128 + STUB_SIGNAL))
while [[ $1 != *bin/dattn ]]; do shift; done
STUB_UNDER=-under-mpirun exec "$@"
"""


class Run(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dattn run "))  # a space, as in a user's folder
        self.addCleanup(shutil.rmtree, self.folder)
        (self.folder / "build/bin").mkdir(parents=True)
        (self.folder / "path").mkdir()
        for place, text in (("build/bin/dattn", DATTN), ("path/mpirun", MPIRUN)):
            (self.folder / place).write_text(text)
            (self.folder / place).chmod(0o755)

    def run_script(self, *arguments, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        environment |= {"DATTN_BUILD": str(self.folder / "build"), "STUB_LOG": str(self.folder / "log"),
                        "PATH": f"{self.folder / 'path'}:{os.environ['PATH']}"} | variables
        result = subprocess.run([ROOT / "launch/run", *arguments], env=environment, cwd=self.folder, timeout=60,
                                capture_output=True, text=True, stdin=subprocess.DEVNULL)
        log = self.folder / "log"
        return result, log.read_text() if log.exists() else ""

    def assert_plain(self, *arguments, **variables):
        result, log = self.run_script(*arguments, **variables)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(log, "")
        self.assertEqual(result.stdout, f"dattn in {self.folder}: {' '.join(arguments)}\n")
        return result

    def test_several_ranks_are_started_with_mpirun_where_the_user_stands(self):
        result, log = self.run_script("train", "my config.yaml", "--set", "train.steps=3", STUB_RANKS="4")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(result.stdout, f"dattn-under-mpirun in {self.folder}: train my config.yaml --set train.steps=3\n")
        self.assertIn("mpirun -np 4 ", log)
        self.assertIn("+ ", result.stderr)
        self.assertIn("mpirun -np 4 ", result.stderr)
        self.assertIn(r"my\ config.yaml", result.stderr)

    def test_more_ranks_than_cores_yield(self):
        _, log = self.run_script("train", "c.yaml", STUB_RANKS="512")
        for word in ("--oversubscribe", "--bind-to none", "mpi_yield_when_idle 1"):
            self.assertIn(word, log)

    def test_one_rank_needs_no_launcher(self):
        self.assert_plain("train", "c.yaml", STUB_RANKS="1")

    def test_ranks_given_as_threads_need_no_launcher(self):
        self.assert_plain("train", "c.yaml", "--ranks", "4", STUB_RANKS="4")
        self.assert_plain("attention", "c.yaml", "--ranks=4", STUB_RANKS="4")

    def test_plan_bench_and_doctor_are_one_process(self):
        for command in ("plan", "bench", "doctor"):
            self.assert_plain(command, "c.yaml", STUB_RANKS="512")

    def test_generate_and_attention_start_their_ranks(self):
        for command in ("generate", "attention"):
            _, log = self.run_script(command, "x", STUB_RANKS="3")
            self.assertIn("mpirun -np 3 ", log)

    def test_help_of_a_command_starts_one_process(self):
        self.assert_plain("train", "--help", STUB_RANKS="4")

    def test_a_launcher_is_joined(self):
        self.assert_plain("train", "c.yaml", STUB_RANKS="4", OMPI_COMM_WORLD_SIZE="4")
        self.assert_plain("train", "c.yaml", STUB_RANKS="4", RANK="0", WORLD_SIZE="4")
        self.assert_plain("train", "c.yaml", STUB_RANKS="4", SLURM_PROCID="0", SLURM_STEP_ID="0")

    def test_a_slurm_batch_script_is_no_launcher(self):
        _, log = self.run_script("train", "c.yaml", STUB_RANKS="4", SLURM_PROCID="0", SLURM_JOB_ID="7")
        self.assertIn("mpirun -np 4 ", log)

    def test_exit_codes_pass_through(self):
        for ranks in ("1", "4"):
            for code in (2, 3, 5):
                result, _ = self.run_script("train", "c.yaml", STUB_RANKS=ranks, STUB_EXIT=str(code))
                self.assertEqual(result.returncode, code)

    def test_a_killed_rank_is_a_failed_peer(self):
        result, _ = self.run_script("train", "c.yaml", STUB_RANKS="4", STUB_SIGNAL="9")
        self.assertEqual(result.returncode, 3)
        self.assertIn("killed by signal 9", result.stderr)

    def test_a_bad_config_is_reported_once_and_starts_nothing(self):
        result, log = self.run_script("train", "broken.yaml")
        self.assertEqual(result.returncode, 2)
        self.assertEqual(result.stdout + log, "")
        self.assertEqual(result.stderr.count("unknown key"), 1)

    def test_further_arguments_of_mpirun(self):
        _, log = self.run_script("train", "c.yaml", STUB_RANKS="4", DATTN_MPIRUN_ARGS="--hostfile hosts")
        self.assertIn("--hostfile hosts", log)

    def test_help_and_nothing(self):
        result, _ = self.run_script("--help")
        self.assertEqual(result.returncode, 0)
        self.assertIn("usage: launch/run COMMAND", result.stdout)
        result, _ = self.run_script()
        self.assertEqual(result.returncode, 2)
        self.assertIn("usage: launch/run COMMAND", result.stderr)


class Setup(unittest.TestCase):
    """launch/setup.sh on a machine where a package is missing and nobody is root."""

    def run_setup(self, dpkg_status):
        folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        stubs = {"dpkg-query": f"#!/bin/bash\nshift 2\nfor p in \"$@\"; do [[ $p == --show ]] || echo \"{dpkg_status} $p\"; done\n",
                 "sudo": "#!/bin/bash\nexit 1\n", "apt-get": "#!/bin/bash\necho CALLED \"$@\"\nexit 1\n"}
        for name, text in stubs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "tree/launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch/setup.sh", folder / "tree/launch/setup.sh")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        command = [folder / "tree/launch/setup.sh"]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        environment = {"PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent",
                       "CUDA_HOME": "/nonexistent"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)

    def test_it_does_nothing_where_all_is_there(self):
        result = self.run_setup("installed")
        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, "", ""))

    def test_it_names_the_remedy_where_it_cannot_install(self):
        result = self.run_setup("not-installed")
        self.assertEqual(result.returncode, 2)
        self.assertNotIn("CALLED", result.stdout + result.stderr)
        self.assertIn("apt-get update && apt-get install g++ cmake", result.stderr)

    def test_an_unknown_option_is_refused(self):
        result = subprocess.run([ROOT / "launch/setup.sh", "--pyhton"], capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 2)
        self.assertIn("unknown option '--pyhton'", result.stderr)


class Test(unittest.TestCase):
    def test_it_says_which_tests_were_skipped_and_how_to_enable_them(self):
        folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        (folder / "launch").mkdir()
        shutil.copy(ROOT / "launch/test", folder / "launch")
        for name in ("launch/setup.sh", "cmake", "ctest"):
            (folder / name).write_text("#!/bin/bash\nexit ${STUB_EXIT:-0}\n" if name == "ctest" else "#!/bin/bash\n")
            (folder / name).chmod(0o755)

        def run(**variables):
            environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
            return subprocess.run([folder / "launch/test"], env=environment, timeout=60, capture_output=True, text=True)

        for code in (0, 8):
            result = run(STUB_EXIT=str(code))
            self.assertEqual(result.returncode, code, result.stderr)
            self.assertRegex(result.stderr, "plugins were skipped; launch/setup.sh --python makes it$")
        (folder / "build/venv/bin").mkdir(parents=True)
        (folder / "build/venv/bin/python").symlink_to("/bin/true")
        self.assertNotIn("skipped", run().stderr)


if __name__ == "__main__":
    unittest.main()
