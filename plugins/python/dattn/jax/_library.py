"""libdattn_jax.so, the custom calls, and what of the C interface is needed while a program is traced."""
import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_void_p

import jax

from dattn import _c

SIGNATURES = {  # beside those of _c
    "dattn_comm_threads": (c_int, [c_void_p, c_int32, POINTER(_c.CommOptions), POINTER(c_void_p)]),
}
TARGETS = {False: "dattn_forward", True: "dattn_backward"}  # by `backward`; one handler, two names for profiles


@functools.cache
def lib():
    loaded = _c.lib()
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def jax_library_path():
    """DATTN_JAX_LIBRARY, or libdattn_jax.so beside libdattn.so."""
    path = os.environ.get("DATTN_JAX_LIBRARY") or os.path.join(os.path.dirname(_c.library_path()), "libdattn_jax.so")
    if not os.path.exists(path):
        raise _c.SystemRefused(f"{path} is not there: dattn was built without jaxlib's headers; run launch/setup.sh --python and"
                               " build again, or install a wheel that was built with jax, or set DATTN_JAX_LIBRARY to the file")
    return path


@functools.cache
def register():
    """Makes the custom calls known to XLA."""
    lib()  # libdattn_jax.so finds it by its soname
    path = jax_library_path()
    try:
        handlers = ctypes.CDLL(path)
    except OSError as error:
        raise _c.SystemRefused(f"{path} cannot be loaded: {error}") from error
    for platform, name in (("cpu", "cpu"), ("CUDA", "cuda")):
        jax.ffi.register_ffi_type(f"dattn_call_{name}", {"type_id": _pointer(handlers, f"dattn_jax_{name}_type_id"),
                                                         "type_info": _pointer(handlers, f"dattn_jax_{name}_type_info")},
                                  platform=platform)
        stages = {stage: jax.ffi.pycapsule(getattr(handlers, f"dattn_jax_{name}_{stage}")) for stage in ("instantiate", "execute")}
        for target in TARGETS.values():
            jax.ffi.register_ffi_target(target, stages, platform=platform)
    return handlers


def _pointer(handlers, name):
    function = getattr(handlers, name)
    function.restype, function.argtypes = c_void_p, []
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
    return new(function(), None, None)


class Handles:
    """Ranks as handles of this thread, to ask plans and shardings of all of them; nothing is sent."""

    def __init__(self, ranks):
        self._owned = []
        context = self.own(lib().dattn_context_destroy, _c.create(lib().dattn_context_create, _c.ContextOptions()))
        comms = (c_void_p * ranks)()
        _c.check(lib().dattn_comm_threads(context, ranks, _c.CommOptions(timeout_s=60), comms))
        self.comms = [self.own(lib().dattn_comm_destroy, comm) for comm in comms]

    def mesh(self, rank, **axes):
        return self.own(lib().dattn_mesh_destroy, _c.create(lib().dattn_mesh_create, self.comms[rank], _c.MeshOptions(**axes)))

    def own(self, destroy, handle):
        self._owned.append((destroy, handle))
        return handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while self._owned:
            destroy, handle = self._owned.pop()
            destroy(handle)


def positions_of(sharding):
    """The rows of a dattn_sharding, as a list."""
    rows = lib().dattn_sharding_rows(sharding)
    positions = (c_int64 * max(rows, 1))()
    _c.check(lib().dattn_sharding_positions(sharding, positions, rows))
    return list(positions[:rows])
