"""The C interface (plugins/c/dattn.h) through ctypes: the structs, the functions, and exceptions for its status codes.

The library is DATTN_LIBRARY, or lies beside this file (an installed wheel), or in the build folder of the source tree."""
import ctypes
import functools
import os
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_uint8
from ctypes import c_uint16, c_uint32, c_uint64, c_void_p

CPU, CUDA = 1, 2
INT, FLOAT, BFLOAT = 0, 2, 4
BIAS, BIAS_PER_BATCH, BIAS_PER_HEAD = 1, 2, 4


def bias_flags(shape):
    """Of a bias [batch or 1, heads or 1, ..]."""
    return BIAS | (BIAS_PER_BATCH if shape[0] > 1 else 0) | (BIAS_PER_HEAD if shape[1] > 1 else 0)


class Error(Exception):
    """What every failure of dattn derives from; `status` is the C interface's code."""
    status = 1


class InternalError(Error, RuntimeError):
    """A defect of dattn."""


class BadInput(Error, ValueError):
    """An option, shape, type or device that is refused: nothing was changed, nothing was sent."""
    status = 2


class PeerLost(Error, RuntimeError):
    """Another rank failed, vanished or did not answer within the deadline."""
    status = 3


class SystemRefused(Error, RuntimeError):
    """The system refused: a library that is missing, memory, a device."""
    status = 5


EXCEPTIONS = {kind.status: kind for kind in (InternalError, BadInput, PeerLost, SystemRefused)}


class Sized(Structure):
    """A struct of the interface: opens with its own size."""

    def __init__(self, **members):
        super().__init__(struct_size=ctypes.sizeof(self), **members)


class Device(Structure):
    _fields_ = [("type", c_int32), ("index", c_int32)]


class DType(Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class Tensor(Structure):
    _fields_ = [("data", c_void_p), ("device", Device), ("ndim", c_int32), ("dtype", DType), ("shape", POINTER(c_int64)),
                ("strides", POINTER(c_int64)), ("byte_offset", c_uint64)]


class ContextOptions(Sized):
    _fields_ = [("struct_size", c_size_t), ("device", Device), ("threads", c_int32)]


class CommOptions(Sized):
    _fields_ = [("struct_size", c_size_t), ("timeout_s", c_double)]


class Part(Structure):
    _fields_ = [("peer", c_int32), ("data", c_void_p), ("bytes", c_uint64)]


StartCallback = CFUNCTYPE(c_int, c_void_p, c_uint32, POINTER(Part), c_int32, POINTER(Part), c_int32, POINTER(c_void_p))
WaitCallback = CFUNCTYPE(c_int, c_void_p, c_void_p, c_double)
ErrorCallback = CFUNCTYPE(c_void_p, c_void_p)  # c_char_p results cannot be kept alive by a Python callback
AbortCallback = CFUNCTYPE(None, c_void_p, c_char_p)
ReleaseCallback = CFUNCTYPE(None, c_void_p)


class Callbacks(Sized):
    _fields_ = [("struct_size", c_size_t), ("user", c_void_p), ("rank", c_int32), ("size", c_int32), ("start", StartCallback),
                ("wait", WaitCallback), ("error", ErrorCallback), ("abort", AbortCallback), ("release", ReleaseCallback)]


class MeshOptions(Sized):
    _fields_ = [("struct_size", c_size_t)] + [(axis, c_int32) for axis in
                                              ("data", "ring_outer", "ring", "rows", "ulysses", "tensor")]


class AttentionOptions(Sized):
    _fields_ = [("struct_size", c_size_t)] + [(name, c_int64) for name in
                                              ("batch", "seq_q", "seq_kv", "heads", "kv_heads", "dim_qk", "dim_v")] + [
        ("dtype", DType), ("attention", c_char_p), ("layout", c_char_p), ("strategy", c_char_p), ("determinism", c_char_p),
        ("bias", c_int32), ("sink", c_int32)]


class PlanInfo(Sized):
    _fields_ = [("struct_size", c_size_t)] + [(name, c_int64) for name in (
        "q_rows", "kv_rows", "first_head", "heads", "first_kv_head", "kv_heads", "forward_bytes", "backward_bytes",
        "forward_stats_bytes", "backward_stats_bytes", "forward_memory", "backward_memory")] + [
        ("forward_flops", c_double), ("backward_flops", c_double)]


class Forward(Sized):
    _fields_ = [("struct_size", c_size_t)] + [(name, POINTER(Tensor)) for name in
                                              ("q", "k", "v", "bias", "sink", "out", "lse")] + [
        ("dropout_stream", c_uint64), ("batch_begin", c_int64), ("layer", c_int32), ("stream", c_void_p)]


class Backward(Sized):
    _fields_ = [("struct_size", c_size_t)] + [(name, POINTER(Tensor)) for name in (
        "q", "k", "v", "bias", "sink", "out", "lse", "dout", "dq", "dk", "dv", "dbias", "dsink")] + [
        ("dropout_stream", c_uint64), ("batch_begin", c_int64), ("layer", c_int32), ("stream", c_void_p)]


class CacheOptions(Sized):
    _fields_ = [("struct_size", c_size_t), ("batch", c_int64), ("layers", c_int32), ("heads", c_int64), ("kv_heads", c_int64),
                ("dim", c_int64), ("max_seq", c_int64), ("dtype", DType), ("attention", c_char_p)]


HANDLE = POINTER(c_void_p)  # where a new handle is written
SIGNATURES = {
    "dattn_version": (c_int32, []),
    "dattn_last_error": (c_char_p, []),
    "dattn_context_create": (c_int, [POINTER(ContextOptions), HANDLE]),
    "dattn_context_destroy": (None, [c_void_p]),
    "dattn_comm_self": (c_int, [c_void_p, HANDLE]),
    "dattn_comm_callbacks": (c_int, [c_void_p, POINTER(Callbacks), POINTER(CommOptions), HANDLE]),
    "dattn_comm_nccl": (c_int, [c_void_p, c_void_p, c_void_p, POINTER(CommOptions), HANDLE]),
    "dattn_comm_abort": (None, [c_void_p, c_char_p]),
    "dattn_comm_destroy": (None, [c_void_p]),
    "dattn_mesh_create": (c_int, [c_void_p, POINTER(MeshOptions), HANDLE]),
    "dattn_mesh_destroy": (None, [c_void_p]),
    "dattn_plan_create": (c_int, [c_void_p, POINTER(AttentionOptions), HANDLE]),
    "dattn_plan_destroy": (None, [c_void_p]),
    "dattn_plan_get_info": (c_int, [c_void_p, POINTER(PlanInfo)]),
    "dattn_plan_explain": (c_int, [c_void_p, POINTER(c_char_p)]),
    "dattn_attention_forward": (c_int, [c_void_p, POINTER(Forward)]),
    "dattn_attention_backward": (c_int, [c_void_p, POINTER(Backward)]),
    "dattn_sharding_create": (c_int, [c_void_p, c_int64, c_char_p, c_char_p, HANDLE]),
    "dattn_sharding_destroy": (None, [c_void_p]),
    "dattn_sharding_rows": (c_int64, [c_void_p]),
    "dattn_sharding_positions": (c_int, [c_void_p, POINTER(c_int64), c_int64]),
    "dattn_unshard": (c_int, [c_void_p, c_int32, POINTER(Tensor), POINTER(Tensor), c_void_p]),
    "dattn_reduce_shard": (c_int, [c_void_p, c_int32, POINTER(Tensor), POINTER(Tensor), c_void_p]),
    "dattn_cache_create": (c_int, [c_void_p, POINTER(CacheOptions), HANDLE]),
    "dattn_cache_destroy": (None, [c_void_p]),
    "dattn_cache_attend": (c_int, [c_void_p, c_int32] + [POINTER(Tensor)] * 4 + [c_void_p]),
    "dattn_cache_length": (c_int64, [c_void_p]),
    "dattn_cache_local_rows": (c_int64, [c_void_p]),
    "dattn_cache_clear": (c_int, [c_void_p]),
}


def library_path():
    """The file that is loaded: the first of the places named above that exists."""
    here = os.path.dirname(os.path.abspath(__file__))
    tree = os.path.dirname(os.path.dirname(os.path.dirname(here)))
    named = os.environ.get("DATTN_LIBRARY")
    places = [named] if named else [os.path.join(here, "libdattn.so.1"), os.path.join(tree, "build/release/lib/libdattn.so")]
    for place in places:
        if os.path.exists(place):
            return place
    raise SystemRefused(f"libdattn.so is in none of: {', '.join(places)}; install the wheel (pip install . in the source tree),"
                        " or set DATTN_LIBRARY to the file")


@functools.cache
def lib():
    """The loaded library, its functions declared."""
    path = library_path()
    try:
        loaded = ctypes.CDLL(path)
    except OSError as error:
        raise SystemRefused(f"{path} cannot be loaded: {error}") from error
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    version = loaded.dattn_version()
    if version // 10000 != 1:
        raise SystemRefused(f"{path} has version {version // 10000}.{version // 100 % 100} of the C interface, but this package"
                            " needs version 1; reinstall dattn")
    return loaded


def library_version():
    """The loaded library's (major, minor, patch)."""
    version = lib().dattn_version()
    return version // 10000, version // 100 % 100, version % 100


def check(status):
    """Raises the exception that belongs to a status, with the library's message."""
    if status != 0:
        raise EXCEPTIONS.get(status, InternalError)(lib().dattn_last_error().decode(errors="replace"))


def create(function, *arguments):
    """Calls a ..._create function; returns its new handle (an int)."""
    handle = c_void_p()
    check(function(*arguments, byref(handle)))
    return handle.value


def text(value):
    return None if value is None else value.encode()
