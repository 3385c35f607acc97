"""What `mesh=` may be (a DeviceMesh, a ProcessGroup, None), as handles of the C interface, made once and kept.

A mesh is described by text-sized values (`MeshSpec`), so that compiled graphs can name it: the process group's name, its
ranks, the axes. Handles are found by that description and released when the interpreter exits."""
import atexit
import ctypes
import dataclasses
import threading
from typing import Optional

import torch
import torch.distributed as dist

from dattn import _c
from dattn.torch import _comm

AXES = ("data", "ring_outer", "ring", "rows", "ulysses", "tensor")
SEQUENCE_AXES = ("ring_outer", "ring", "rows", "ulysses")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Ranks of one attention call: those of the sequence and tensor axes. `data` takes no part; its coordinate does, since
    dropout is keyed by the batch row's number."""
    group: Optional[str] = None  # name of the process group that carries messages; None: one rank
    ranks: Optional[tuple] = None  # ranks in that group, in the order of the axes; None: all
    axes: tuple = ()  # ((name, ranks), ..), slowest first
    data_index: int = 0
    timeout_s: float = 0.0

    @property
    def sequence_ranks(self):
        return self._ranks(SEQUENCE_AXES)

    @property
    def tensor_ranks(self):
        return self._ranks(("tensor",))

    def _ranks(self, names):
        product = 1
        for axis, ranks in self.axes:
            product *= ranks if axis in names else 1
        return product


ONE_RANK = MeshSpec()


def spec_of(mesh, strategy="auto", timeout_s=None):
    """The MeshSpec of what a user gave. Nothing is sent."""
    if mesh is None:
        return ONE_RANK
    if isinstance(mesh, MeshSpec):
        return mesh
    if isinstance(mesh, dist.ProcessGroup):
        axis = "ulysses" if strategy == "ulysses" else "ring"
        return _finish(mesh, None, ((axis, mesh.size()),), 0, timeout_s)
    if isinstance(mesh, dist.DeviceMesh):
        return _spec_of_device_mesh(mesh, timeout_s)
    raise _c.BadInput(f"mesh is a {type(mesh).__name__}; give a torch DeviceMesh, a ProcessGroup, or None for one rank")


def _spec_of_device_mesh(mesh, timeout_s):
    names = mesh.mesh_dim_names
    if not names:
        raise _c.BadInput(f"mesh has no dimension names; give init_device_mesh mesh_dim_names out of {', '.join(AXES)}")
    ours = [name for name in names if name in AXES]
    if not ours:
        raise _c.BadInput(f"mesh has dimensions {', '.join(names)}; none is one of ours: {', '.join(AXES)}")
    if ours != [axis for axis in AXES if axis in ours]:
        raise _c.BadInput(f"mesh has dimensions in the order {', '.join(ours)}; ours go {', '.join(AXES)}, slowest first")
    if mesh.get_coordinate() is None:
        raise _c.BadInput(f"rank {dist.get_rank()} is not part of the mesh; call on its ranks only")
    data_index = mesh.get_local_rank("data") if "data" in ours else 0
    axes = tuple((name, mesh.size(names.index(name))) for name in ours if name != "data")
    wide = [name for name, ranks in axes if ranks > 1]
    if not wide:
        return MeshSpec(axes=axes, data_index=data_index)
    if len(wide) == 1:  # torch has a group of just these ranks
        return _finish(mesh.get_group(wide[0]), None, axes, data_index, timeout_s)
    # Messages travel by the world's group, between the ranks of our dimensions.
    index = [slice(None) if name in wide else at for name, at in zip(names, mesh.get_coordinate())]
    ranks = tuple(mesh.mesh[tuple(index)].flatten().tolist())
    return _finish(dist.group.WORLD, ranks, axes, data_index, timeout_s)


def _finish(group, ranks, axes, data_index, timeout_s):
    size = group.size() if ranks is None else len(ranks)
    if size == 1:
        return MeshSpec(axes=axes, data_index=data_index)
    seconds = timeout_s if timeout_s is not None else _comm.default_timeout_s(group)
    if not seconds > 0:
        raise _c.BadInput(f"timeout_s is {seconds}; it must be positive")
    return MeshSpec(group.group_name, ranks, axes, data_index, float(seconds))


class Mesh:
    """Handles of one MeshSpec on one device: context, communicator, mesh, and a ring of all its ranks."""

    def __init__(self, spec, device):
        lib = _c.lib()
        self.spec, self.device = spec, device
        self.threads = torch.get_num_threads() if device.type == "cpu" else 0
        self.lock = threading.RLock()  # one rank's handles are used by one thread at a time
        self._handles, self.callbacks = [], None
        self.group = None if spec.group is None else dist.distributed_c10d._resolve_process_group(spec.group)
        try:
            where = _c.Device(_c.CUDA if device.type == "cuda" else _c.CPU, device.index or 0)
            context = self._own(lib.dattn_context_destroy, _c.create(
                lib.dattn_context_create, ctypes.byref(_c.ContextOptions(device=where, threads=self.threads))))
            self.comm = self._make_comm(lib, context)
            self.mesh = self._make_mesh(lib, dict(spec.axes))
            self._everyone = None
        except BaseException:
            self.close()
            raise

    def _make_comm(self, lib, context):
        if self.group is None:
            return self._own(lib.dattn_comm_destroy, _c.create(lib.dattn_comm_self, context))
        self.callbacks = _comm.GroupComm(self.group, self.spec.ranks, self.spec.timeout_s)
        if self.device.type == "cpu":
            return self._own(lib.dattn_comm_destroy, self.callbacks.create(context))
        # A NCCL communicator of our own moves device tensors; the group carries ids, errors and signs of life.
        host = self._own(lib.dattn_context_destroy, _c.create(lib.dattn_context_create, ctypes.byref(_c.ContextOptions())))
        control = self._own(lib.dattn_comm_destroy, self.callbacks.create(host))
        options = _c.CommOptions(timeout_s=self.spec.timeout_s)
        return self._own(lib.dattn_comm_destroy, _c.create(lib.dattn_comm_nccl, context, control, None, ctypes.byref(options)))

    def _make_mesh(self, lib, axes):
        return self._own(lib.dattn_mesh_destroy, _c.create(
            lib.dattn_mesh_create, self.comm, ctypes.byref(_c.MeshOptions(**axes))))

    @property
    def everyone(self):
        """The mesh's ranks as one ring, for what all of them must agree on."""
        if self._everyone is None:
            size = 1
            for _, ranks in self.spec.axes:
                size *= ranks
            self._everyone = self._make_mesh(_c.lib(), {"ring": size})
        return self._everyone

    def run(self, function, *arguments):
        """A call of the C interface that may communicate. Raises what it fails with."""
        if self.callbacks is None:
            _c.check(function(*arguments))
        else:
            self.callbacks.run(function, arguments)

    def is_current(self):
        """False once its process group was destroyed or the number of threads was changed."""
        if self.device.type == "cpu" and torch.get_num_threads() != self.threads:
            return False
        return self.group is None or self.group in dist.distributed_c10d._world.pg_map

    def _own(self, destroy, handle):
        self._handles.append((destroy, handle))
        return handle

    def close(self):
        while self._handles:
            destroy, handle = self._handles.pop()
            destroy(handle)
        if self.callbacks is not None:
            self.callbacks.close()


_meshes = {}
_on_close = []  # called with a Mesh that is given up: caches of what was made from it


def mesh_of(spec, device):
    """The Mesh of a spec, made at first use. All ranks make them in the same order, as they make the calls."""
    key = (spec, device.type, device.index)
    mesh = _meshes.get(key)
    if mesh is None or not mesh.is_current():
        if mesh is not None:
            give_up(mesh)
        mesh = _meshes[key] = Mesh(spec, device)
    return mesh


def give_up(mesh):
    for forget in _on_close:
        forget(mesh)
    mesh.close()


@atexit.register
def release_all():
    """Releases all handles: at exit, or before a process group is destroyed."""
    while _meshes:
        give_up(_meshes.popitem()[1])
