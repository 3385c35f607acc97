"""Jobs of processes under mpirun, and over TCP as torchrun would start them: every collective case, and that each failure ends the whole job, within the deadline,
with one message and the right exit code. DATTN_JOB_CASES names the program, DATTN_MPIEXEC the launcher."""

import os
import signal
import socket
import subprocess
import time
import unittest

PROGRAM = os.environ["DATTN_JOB_CASES"]
MPIEXEC = os.environ.get("DATTN_MPIEXEC", "mpirun")
TIMEOUT_S = 3.0
START_S = 2.5  # mpirun's own start, on a busy machine


def launch(ranks, case, environment=None):
    """Runs the case; returns its exit code, stdout, our lines of stderr, and the seconds it took."""
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, check=True).stdout
    open_mpi = "Open MPI" in version or "OpenRTE" in version
    flags = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"] if open_mpi else []
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    begin = time.monotonic()
    job = subprocess.run(
        [MPIEXEC, "-np", str(ranks), *flags, PROGRAM, case, "--timeout", str(TIMEOUT_S)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **root, **(environment or {})})
    lines = [line for line in job.stderr.splitlines() if line.startswith("dattn:")]
    return job.returncode, job.stdout, lines, time.monotonic() - begin


def processes_left():
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if line.startswith(PROGRAM)]


class Collectives(unittest.TestCase):
    def check(self, ranks):
        code, out, errors, _ = launch(ranks, "collectives")
        self.assertEqual((code, errors), (0, []))
        self.assertEqual(out.count("ok "), 13)

    def test_2_ranks(self):
        self.check(2)

    def test_3_ranks(self):
        self.check(3)

    def test_4_ranks(self):
        self.check(4)

    def test_waiting_ranks_sleep(self):  # four to a core, here
        self.assertEqual(launch(8, "waiting")[::2], (0, []))


class Failures(unittest.TestCase):
    def check(self, ranks, case, code, words, seconds):
        got, _, errors, took = launch(ranks, case)
        self.assertEqual(got, code, errors)
        self.assertEqual(len(errors), 1, errors)
        for word in words:
            self.assertIn(word, errors[0])
        self.assertLess(took, seconds + START_S)
        self.assertEqual(processes_left(), [])

    def test_stopped_rank_ends_the_job_itself_included(self):
        words = ["no sign of life from rank 2", "all_reduce, layer 1, step", "133332 bytes", "stopped"]
        self.check(3, "stopped", 3, words, TIMEOUT_S + 2)

    def test_deadlock(self):
        self.check(3, "deadlock", 3, ["rotate, layer 4, step 2", "4 bytes", "waits too"], TIMEOUT_S + 2)

    def test_error_of_one_rank(self):
        self.check(4, "error", 5, ["checkpoint.tmp: no space left on device [rank 3/4]"], 3)

    def test_the_same_error_on_all_ranks_is_said_once(self):
        self.check(4, "bad_input", 2, ["unknown key 'stratgy'"], 3)

    def test_sizes_that_differ(self):
        self.check(2, "sizes", 1, ["awaits 64 bytes", "96 bytes", "rank 0", "rank 1"], 3)

    def test_killed_rank(self):
        code, _, _, took = launch(3, "killed")  # mpirun itself says it
        self.assertEqual(code, 137)
        self.assertLess(took, TIMEOUT_S + 2 + START_S)
        self.assertEqual(processes_left(), [])

    def test_computing_for_longer_than_the_deadline_is_no_failure(self):
        code, out, errors, _ = launch(3, "long_compute")
        self.assertEqual((code, out, errors), (0, "ok long_compute\n", []))

    def test_a_missing_shim_says_what_was_looked_for(self):
        code, _, errors, _ = launch(2, "collectives", {"DATTN_MPI_SHIM": "/nowhere/libdattn_mpi.so"})
        self.assertNotEqual(code, 0)
        self.assertEqual(len(errors), 1, errors)
        self.assertIn("/nowhere/libdattn_mpi.so", errors[0])


class Nccl(unittest.TestCase):
    """Device tensors over NCCL (stand-ins of NCCL and CUDA, named by DATTN_NCCL and DATTN_CUDA_MODULE), MPI beside it."""

    def test_collectives(self):
        for ranks in (2, 3):
            code, out, errors, _ = launch(ranks, "nccl_collectives")
            self.assertEqual((code, errors), (0, []))
            self.assertEqual(out.count("ok "), 13)

    def check(self, case, code, words, seconds, environment=None):
        got, _, errors, took = launch(3, case, environment)
        self.assertEqual(got, code, errors)
        self.assertEqual(len(errors), 1, errors)
        for word in words:
            self.assertIn(word, errors[0])
        self.assertLess(took, seconds + START_S)
        self.assertEqual(processes_left(), [])

    def test_stopped_rank(self):
        self.check("nccl_stopped", 3, ["a transfer between devices has not ended", "all_reduce", "rank 2"], TIMEOUT_S + 3)

    def test_error_of_one_rank(self):
        self.check("nccl_error", 5, ["checkpoint.tmp: no space left on device [rank 2/3]"], 3)

    def test_lost_message(self):  # the next one is found in its place
        self.check("nccl_collectives", 3, ["NCCL reports 'invalid usage'", "from rank 1", "group 'world'"], TIMEOUT_S + 3,
                   {"DATTN_NCCL_FAULT": "drop 1 3"})

    def test_rank_that_never_joins(self):
        self.check("nccl_collectives", 3, ["did not connect the ranks"], TIMEOUT_S + 3, {"DATTN_NCCL_FAULT": "absent 0"})

    def test_killed_rank(self):
        code, _, _, took = launch(3, "nccl_killed")
        self.assertEqual(code, 137)
        self.assertLess(took, TIMEOUT_S + 2 + START_S)
        self.assertEqual(processes_left(), [])

    def test_missing_nccl_says_what_was_looked_for(self):
        self.check("nccl_collectives", 5, ["NCCL cannot be loaded", "/nowhere/libnccl.so.2"], 3,
                   {"DATTN_NCCL": "/nowhere/libnccl.so.2"})


class Launchers(unittest.TestCase):
    """What is read from a launcher's variables."""

    def run_with(self, *arguments, **variables):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "SLURM_"))}
        return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=60, env={**clean, **variables})

    def test_variables(self):
        slurm = {"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "9", "SLURM_LOCALID": "0",
                 "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3"}
        for variables, text in [
                ({}, " 0/1 0/1"),
                ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                  "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"}, "openmpi 3/8 1/2"),
                ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "torchrun 1/4 1/2"),
                ({"PMI_RANK": "2", "PMI_SIZE": "3"}, "pmi 2/3 0/1"),
                (slurm, "slurm 5/7 0/3"),
                ({"SLURM_PROCID": "0", "SLURM_NTASKS": "9"}, " 0/1 0/1")]:  # a batch script, no step
            self.assertEqual(self.run_with("launch", **variables).stdout, text + "\n", variables)

    def test_contradictions_are_refused(self):
        for arguments, variables, text in [
                (["--ranks", "3"], {"RANK": "0", "WORLD_SIZE": "2"}, "--ranks 3 but torchrun started 2"),
                ([], {"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
                ([], {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR")]:
            job = self.run_with("collectives", *arguments, **variables)
            self.assertEqual(job.returncode, 2, job.stderr)
            self.assertIn(text, job.stderr)

    def test_threads(self):
        job = self.run_with("collectives", "--ranks", "3")
        self.assertEqual((job.returncode, job.stdout.count("ok "), job.stderr), (0, 13, ""))
        job = self.run_with("error", "--ranks", "3")
        self.assertEqual((job.returncode, job.stderr), (5, "dattn: checkpoint.tmp: no space left on device [rank 2/3]\n"))


class Tcp(unittest.TestCase):
    """Processes with torchrun's variables."""

    def start(self, ranks, case, timeout=TIMEOUT_S):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        jobs = []
        for rank in range(ranks):
            names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks,
                     "MASTER_ADDR": "localhost", "MASTER_PORT": port - 1}
            jobs.append(subprocess.Popen([PROGRAM, case, "--timeout", str(timeout)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                         text=True, env={**os.environ, **{k: str(v) for k, v in names.items()}}))
        return jobs

    def finish(self, jobs):
        """Exit codes, and all that our lines of stderr say."""
        try:
            out = [job.communicate(timeout=60) for job in jobs]
        except subprocess.TimeoutExpired:
            for job in jobs:
                job.kill()
            raise
        lines = [line for _, errors in out for line in errors.splitlines() if line.startswith("dattn:")]
        return [job.returncode for job in jobs], "".join(text for text, _ in out), lines

    def test_collectives(self):
        for ranks in (2, 3, 4):
            codes, out, errors = self.finish(self.start(ranks, "collectives", 30))
            self.assertEqual((codes, errors), ([0] * ranks, []))
            self.assertEqual(out.count("ok "), 13)

    def test_killed_rank(self):
        codes, _, errors = self.finish(self.start(3, "killed"))
        self.assertEqual(codes, [3, 3, -signal.SIGKILL])
        self.assertEqual(len(errors), 1, errors)
        self.assertIn("rank 2 has already ended", errors[0])

    def test_stopped_rank(self):
        begin = time.monotonic()
        jobs = self.start(3, "stopped")
        codes, _, errors = self.finish(jobs[:2])
        self.assertLess(time.monotonic() - begin, TIMEOUT_S + 2 + START_S)
        jobs[2].kill()  # torchrun's part
        jobs[2].communicate()
        self.assertEqual(codes, [3, 3])
        self.assertEqual(len(errors), 1, errors)
        self.assertIn("no sign of life from rank 2", errors[0])

    def test_error_of_one_rank_deadlock_and_long_compute(self):
        codes, _, errors = self.finish(self.start(3, "error"))
        self.assertEqual((codes, len(errors)), ([5, 5, 5], 1), errors)
        codes, _, errors = self.finish(self.start(3, "deadlock"))
        self.assertEqual((codes, len(errors)), ([3, 3, 3], 1), errors)
        codes, out, errors = self.finish(self.start(3, "long_compute"))
        self.assertEqual((codes, out, errors), ([0, 0, 0], "ok long_compute\n", []))


if __name__ == "__main__":
    unittest.main()
