"""Tests on several ranks: `@on_ranks(4)` runs the test's body in 4 processes joined by gloo. The processes serve all tests of a
session, since starting them takes longer than most tests."""
import functools
import importlib
import multiprocessing
import os
import sys
import traceback
from datetime import timedelta

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
_HERE = os.path.dirname(os.path.abspath(__file__))
_PATHS = [os.path.join(ROOT, "plugins", "python"), _HERE, os.path.dirname(_HERE)]
sys.path[:0] = _PATHS

import torch
import torch.distributed as dist

DEADLINE_S = 300  # of one test
_pools = {}
_preloaded = ["torch", "torch.distributed", "dattn.torch"]


def preload(*modules):
    """Modules that take long to import: once, in the process that those of all ranks are forked from."""
    _preloaded.extend(modules)


def _context():
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([*_PATHS, os.environ.get("PYTHONPATH", "")])  # that process reads no sys.path
    context.set_forkserver_preload(_preloaded)
    return context


def on_ranks(size):
    """The test runs on `size` ranks; it fails with the first rank's traceback."""
    def decorate(test):
        @functools.wraps(test)
        def run(**arguments):
            pool = _pools.get(size)
            if pool is None:
                pool = _pools[size] = Pool(size)
            pool.run(test.__module__, test.__name__, arguments)
        run.body = test
        return run
    return decorate


class Pool:
    def __init__(self, size):
        context = _context()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self.store.port, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, module, name, arguments):
        for pipe in self.pipes:
            pipe.send((module, name, arguments))
        failures = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(DEADLINE_S):
                failures.append(f"rank {rank}: no result within {DEADLINE_S} s")
                continue
            result = pipe.recv()
            if result is not None:
                failures.append(f"rank {rank}: {result}")
        if failures:  # ranks may be out of step now
            self.stop()
            _pools.pop(len(self.pipes), None)
            raise AssertionError("\n".join(failures))

    def stop(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def stop_pools():
    while _pools:
        _pools.popitem()[1].stop()


def _serve(rank, size, port, pipe):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(7)
            getattr(importlib.import_module(module), name).body(**arguments)
            dist.barrier()
            pipe.send(None)
        except BaseException:  # noqa: B036  whatever it was, the parent is told
            pipe.send(traceback.format_exc()[-3000:])


@functools.cache
def mesh(**axes):
    """A DeviceMesh of the world with these dimensions."""
    return dist.init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
