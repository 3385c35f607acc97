#!/usr/bin/env python3
"""Processes as ranks, of a host that has no way to communicate of its own: joined by the library's sockets, and by MPI, which the
library initialises and finalises since the host does not. Every rank compares its rows with what it computes alone. Ranks with a
CUDA device each, of the stand-in, are joined by NCCL's.

usage: ranks_test.py    or, as a rank: ranks_test.py tcp|cuda|nccl RANK SIZE PORT | ranks_test.py mpi"""
import ctypes
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import unittest

from ctypes_test import FP32, AttentionOptions, Device, Forward, MeshOptions, lib, tensor

SEQ, RANKS = 12, 3
# The stand-in of CUDA has more thread-local variables than Python leaves room for.
STANDIN = {"GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=16384"}
lib.dattn_comm_rank.argtypes = lib.dattn_comm_size.argtypes = [ctypes.c_void_p]


class ContextOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("device", Device), ("threads", ctypes.c_int32)]


def check(status):
    if status != 0:
        sys.exit(lib.dattn_last_error().decode())


def made(function, *arguments):
    handle = ctypes.c_void_p()
    check(function(*arguments, ctypes.byref(handle)))
    return handle


def attend(comm, ring):
    """{position: output} of this rank's rows of a causal attention in which values are numbered."""
    mesh = made(lib.dattn_mesh_create, comm, ctypes.byref(MeshOptions(ctypes.sizeof(MeshOptions), ring=ring)))
    options = AttentionOptions(ctypes.sizeof(AttentionOptions), batch=1, seq_q=SEQ, heads=1, dim_qk=1, dtype=FP32,
                               determinism=os.environ.get("TEST_DETERMINISM", "repeatable").encode())
    plan = made(lib.dattn_plan_create, mesh, ctypes.byref(options))
    rows = SEQ // ring
    positions = (ctypes.c_int64 * rows)()
    check(lib.dattn_plan_positions(plan, 0, positions, ctypes.c_int64(rows)))
    x, out = tensor([math.sin(at) for at in positions], 1, rows, 1, 1), tensor([0] * rows, 1, rows, 1, 1)
    call = Forward(ctypes.sizeof(Forward), q=ctypes.pointer(x), k=ctypes.pointer(x), v=ctypes.pointer(x), out=ctypes.pointer(out))
    check(lib.dattn_attention_forward(plan, ctypes.byref(call)))
    lib.dattn_plan_destroy(plan)
    lib.dattn_mesh_destroy(mesh)
    return dict(zip(positions, out.kept[0]))


def be_a_rank(kind, rank=None, size=RANKS, port=0):
    on_device = ContextOptions(ctypes.sizeof(ContextOptions), device=Device(2, int(rank or 0)))
    context = made(lib.dattn_context_create, ctypes.byref(on_device) if kind == "cuda" else None)
    if kind == "mpi":
        comm = made(lib.dattn_comm_mpi, context, None, None)
    else:
        comm = made(lib.dattn_comm_tcp, context, b"127.0.0.1", int(port), int(rank), int(size), None)
    if kind == "nccl":
        made(lib.dattn_comm_nccl, made(lib.dattn_context_create, ctypes.byref(on_device)), comm, None, None)
        return print(f"rank {rank} has joined", flush=True)
    if lib.dattn_comm_size(comm) != RANKS:
        sys.exit(f"{lib.dattn_comm_size(comm)} ranks, not {RANKS}")
    own, alone = attend(comm, RANKS), attend(made(lib.dattn_comm_self, context), 1)
    if any(abs(value - alone[at]) > 1e-6 for at, value in own.items()):
        sys.exit(f"rank {lib.dattn_comm_rank(comm)} has {own}; alone it is {alone}")
    print(f"rank {lib.dattn_comm_rank(comm)}: {len(own)} rows", flush=True)
    lib.dattn_comm_destroy(comm)
    lib.dattn_context_destroy(context)


class Ranks(unittest.TestCase):
    def check_lines(self, out):
        self.assertEqual(sorted(out.split("\n")), ["", *(f"rank {rank}: {SEQ // RANKS} rows" for rank in range(RANKS))])

    def join_by_sockets(self, kind, size, code, variables=lambda rank: {}):
        """What each rank writes to stdout and stderr."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [subprocess.Popen([sys.executable, __file__, kind, str(rank), str(size), str(port)], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **variables(rank)})
                 for rank in range(size)]
        results = [rank.communicate(timeout=120) for rank in ranks]
        self.assertEqual([rank.returncode for rank in ranks], [code] * size, results)
        return results

    def test_sockets(self):
        self.check_lines("".join(out for out, _ in self.join_by_sockets("tcp", RANKS, 0)))

    @unittest.skipUnless(platform.machine() == "x86_64", "one instruction set here")
    def test_other_instructions_are_refused_where_bits_are_promised(self):
        def one_portable(rank):
            return {"DATTN_CPU": "portable"} if rank == 1 else {}

        self.check_lines("".join(out for out, _ in self.join_by_sockets("tcp", RANKS, 0, one_portable)))
        invariant = self.join_by_sockets("tcp", RANKS, 1, lambda rank: one_portable(rank) | {"TEST_DETERMINISM": "invariant"})
        for _, text in invariant:
            for part in ("the CPU kernel of rank 1", "portable, of rank 0", "determinism invariant needs one for all ranks"):
                self.assertIn(part, text)

    @unittest.skipUnless("DATTN_NCCL" in os.environ, "no NCCL; set DATTN_NCCL")
    def test_other_devices_are_refused_where_bits_are_promised(self):
        def kind_of_rank(rank):
            return STANDIN | {"DATTN_CUDA_STANDIN_DEVICES": str(RANKS), "DATTN_CUDA_STANDIN_CAPABILITY": f"{8 + rank}.0",
                              "TEST_DETERMINISM": "invariant"}

        for _, text in self.join_by_sockets("cuda", RANKS, 1, kind_of_rank):
            for part in ("the GPU of rank 1", "compute capability 9.0", "determinism invariant needs GPUs of one kind"):
                self.assertIn(part, text)

    @unittest.skipUnless("DATTN_NCCL" in os.environ, "no NCCL; set DATTN_NCCL")
    def test_versions_of_nccl(self):
        def version(number):
            return STANDIN | {"DATTN_NCCL_STANDIN_VERSION": str(number)}

        for rank, (out, _) in enumerate(self.join_by_sockets("nccl", 2, 0, lambda rank: version(22800))):
            self.assertEqual(out, f"rank {rank} has joined\n")
        for _, text in self.join_by_sockets("nccl", 2, 1, lambda rank: version(22800 + 100 * rank)):
            for part in ("NCCL of rank 1", "2.29.0", "2.28.0", "install one version on all hosts"):
                self.assertIn(part, text)

    @unittest.skipUnless(shutil.which("mpirun"), "no mpirun; launch/setup.sh installs it")
    def test_mpi(self):
        environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        launch = ["mpirun", "-np", str(RANKS), "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        done = subprocess.run([*launch, sys.executable, __file__, "mpi"], capture_output=True, text=True, timeout=120,
                              env=environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.check_lines(done.stdout)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        be_a_rank(*sys.argv[1:])
    else:
        unittest.main()
