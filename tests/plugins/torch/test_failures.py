"""A rank that dies, a rank that stops, Ctrl-C, and the end of a program: nobody hangs, everybody is told."""
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, {here!r})
import ranks, torch, torch.distributed as dist, dattn, dattn.torch
from datetime import timedelta
rank, size, port, how = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
def attend(rows=8):
    q = torch.randn(1, rows, 4, 64)
    dattn.torch.attention(q, q, q, mesh=dist.group.WORLD, seq_len=rows * size, timeout_s=120 if how == "sleeps" else 6)
attend()
dist.barrier()
if rank == size - 1:
    if how == "dies": os.kill(os.getpid(), signal.SIGKILL)
    if how in ("stops", "sleeps"): time.sleep(200)
    if how == "is late": time.sleep(3)
began = time.monotonic()
try:
    print("waiting", flush=True)
    attend(16000 if how == "computes" else 8)
    print("returned", flush=True)
except dattn.PeerLost as error:
    print("PeerLost", round(time.monotonic() - began, 1), str(error).replace(chr(10), " "), flush=True)
except KeyboardInterrupt:
    print("KeyboardInterrupt", flush=True)
if how == "is late": dist.destroy_process_group()
"""


class Job:
    def __init__(self, size, how):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.processes = [subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(here=HERE), str(rank), str(size), str(self.store.port), how],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(size)]

    def results(self, ranks, timeout=120):
        """(exit status, output, errors) of these ranks."""
        done = []
        for rank in ranks:
            out, err = self.processes[rank].communicate(timeout=timeout)
            done.append((self.processes[rank].returncode, out, err))
        return done

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("how", ["dies", "stops"])
def test_a_lost_rank_is_noticed_by_all(how):
    with Job(3, how) as job:
        for code, out, err in job.results([0, 1]):
            name, seconds, text = out.split("waiting\n")[1].split(" ", 2)
            assert name == "PeerLost" and float(seconds) < (5 if how == "dies" else 10), (out, err)
            assert "group" in text and err == "" and code == 0, err  # says where; nothing else is printed


def test_a_late_rank_is_waited_for_and_programs_end():
    with Job(2, "is late") as job:  # and destroys the process group before dattn's handles
        for code, out, err in job.results([0, 1]):
            assert code == 0 and out.endswith("returned\n") and err == "", err


def test_ctrl_c_while_waiting():
    """It ends the call on this rank at once, and on the others, which are told why."""
    with Job(3, "sleeps") as job:
        waiting = job.processes[:2]
        for process in waiting:
            while process.stdout.readline() != "waiting\n":
                assert process.poll() is None
        time.sleep(1.5)
        waiting[0].send_signal(signal.SIGINT)
        (code, out, err), (other_code, other_out, other_err) = job.results([0, 1], timeout=30)  # long before the deadline
        assert out == "KeyboardInterrupt\n" and code == 0, (out, err)
        assert other_out.startswith("PeerLost") and "KeyboardInterrupt on rank 0" in other_out, (other_out, other_err)
        assert (err, other_err, other_code) == ("", "", 0)


def test_ctrl_c_while_computing():
    """A computation is not interrupted: the call ends when that of its present step has; so does that of the other rank, which
    may have all it needs."""
    with Job(2, "computes") as job:
        for process in job.processes:
            while process.stdout.readline() != "waiting\n":
                assert process.poll() is None
        time.sleep(0.5)
        job.processes[0].send_signal(signal.SIGINT)
        (code, out, err), (other_code, other_out, other_err) = job.results([0, 1], timeout=60)
        assert (out, err, code) == ("KeyboardInterrupt\n", "", 0)
        assert other_out.split()[0] in ("returned", "PeerLost") and (other_err, other_code) == ("", 0), (other_out, other_err)
