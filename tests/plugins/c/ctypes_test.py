"""The C interface from Python's ctypes: one causal attention of one rank against plain arithmetic, and an error's text."""
import ctypes
import math
import os
import unittest

lib = ctypes.CDLL(os.environ["DATTN_LIBRARY"])
lib.dattn_last_error.restype = ctypes.c_char_p


class DType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", Device), ("ndim", ctypes.c_int32), ("dtype", DType),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64)]


class MeshOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t)] + [
        (name, ctypes.c_int32) for name in ("data", "ring_outer", "ring", "rows", "ulysses", "tensor")]


class AttentionOptions(ctypes.Structure):
    _fields_ = ([("struct_size", ctypes.c_size_t)] +
                [(name, ctypes.c_int64) for name in ("batch", "seq_q", "seq_kv", "heads", "kv_heads", "dim_qk", "dim_v")] +
                [("dtype", DType)] +
                [(name, ctypes.c_char_p) for name in ("attention", "layout", "strategy", "determinism")] +
                [("bias", ctypes.c_int32), ("sink", ctypes.c_int32)])


class Forward(ctypes.Structure):
    _fields_ = ([("struct_size", ctypes.c_size_t)] +
                [(name, ctypes.POINTER(Tensor)) for name in ("q", "k", "v", "bias", "sink", "out", "lse")] +
                [("dropout_stream", ctypes.c_uint64), ("batch_begin", ctypes.c_int64), ("layer", ctypes.c_int32),
                 ("stream", ctypes.c_void_p)])


FP32 = DType(2, 32, 1)


def tensor(values, *shape):
    memory = (ctypes.c_float * len(values))(*values)
    extents = (ctypes.c_int64 * len(shape))(*shape)
    made = Tensor(ctypes.cast(memory, ctypes.c_void_p), Device(1, 0), len(shape), FP32, extents, None, 0)
    made.kept = (memory, extents)
    return made


class Ctypes(unittest.TestCase):
    def check(self, status):
        self.assertEqual(status, 0, lib.dattn_last_error())

    def setUp(self):
        self.context, self.comm, self.mesh, self.plan = (ctypes.c_void_p() for _ in range(4))
        self.check(lib.dattn_context_create(None, ctypes.byref(self.context)))
        self.check(lib.dattn_comm_self(self.context, ctypes.byref(self.comm)))
        self.check(lib.dattn_mesh_create(self.comm, ctypes.byref(MeshOptions(ctypes.sizeof(MeshOptions))),
                                         ctypes.byref(self.mesh)))
        self.options = AttentionOptions(ctypes.sizeof(AttentionOptions), batch=1, seq_q=3, heads=1, dim_qk=2, dtype=FP32)

    def tearDown(self):
        lib.dattn_plan_destroy(self.plan)
        lib.dattn_mesh_destroy(self.mesh)
        lib.dattn_comm_destroy(self.comm)
        lib.dattn_context_destroy(self.context)

    def test_attention(self):
        self.check(lib.dattn_plan_create(self.mesh, ctypes.byref(self.options), ctypes.byref(self.plan)))
        q, k, v = [[1, 2], [3, 1], [0, 1]], [[1, 0], [0, 1], [1, 1]], [[1, 2], [3, 4], [5, 6]]
        flat = [tensor([x for row in rows for x in row], 1, 3, 1, 2) for rows in (q, k, v)]
        out, lse = tensor([0] * 6, 1, 3, 1, 2), tensor([0] * 3, 1, 1, 3)
        call = Forward(ctypes.sizeof(Forward), q=ctypes.pointer(flat[0]), k=ctypes.pointer(flat[1]), v=ctypes.pointer(flat[2]),
                       out=ctypes.pointer(out), lse=ctypes.pointer(lse))
        self.check(lib.dattn_attention_forward(self.plan, ctypes.byref(call)))
        for row in range(3):
            weights = [math.exp(sum(a * b for a, b in zip(q[row], k[key])) / math.sqrt(2)) for key in range(row + 1)]
            self.assertAlmostEqual(lse.kept[0][row], math.log(sum(weights)), places=5)
            for i in range(2):
                expected = sum(w * v[key][i] for key, w in enumerate(weights)) / sum(weights)
                self.assertAlmostEqual(out.kept[0][row * 2 + i], expected, places=5)

    def test_errors_are_texts(self):
        self.options.strategy = b"teleport"
        self.assertEqual(lib.dattn_plan_create(self.mesh, ctypes.byref(self.options), ctypes.byref(self.plan)), 2)
        self.assertIn(b"teleport", lib.dattn_last_error())
        self.assertIsNone(self.plan.value)


if __name__ == "__main__":
    unittest.main()
