"""Which mesh axes carry a call: the manual axes of the enclosing shard_map that have our names, or those that `axes` names."""
import dataclasses
import math
import os
from typing import Optional

import jax
import jax.numpy as jnp

from dattn import _c

AXES = ("data", "ring_outer", "ring", "rows", "ulysses", "tensor")  # slowest first
SEQUENCE_AXES = AXES[1:5]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Mesh axes by what they do. Names are JAX's; sizes count devices."""
    names: tuple = (None,) * 6  # of AXES; None where there is none
    sizes: tuple = (1,) * 6
    others: tuple = ()  # ((name, size), ..): manual axes whose devices make calls side by side
    devices: int = 1  # of the mesh

    @property
    def ranks(self):
        return math.prod(self.sizes[1:])

    @property
    def sequence_parts(self):
        return math.prod(self.sizes[1:5])

    @property
    def sequence_names(self):
        return tuple(name for name in self.names[1:5] if name is not None)

    def sequence_index(self):
        return _index(zip(self.names[1:5], self.sizes[1:5]))

    def place(self):
        """[3] int32: this device's rank, the number of its group, its batch coordinate."""
        data = _index([(self.names[0], self.sizes[0])])
        group = _index([(self.names[0], self.sizes[0]), *self.others])
        return jnp.stack([_index(zip(self.names[1:], self.sizes[1:])), group, data])


def _index(axes):
    index = jnp.int32(0)
    for name, size in axes:
        if name is not None:
            index = index * jnp.int32(size) + jax.lax.axis_index(name).astype(jnp.int32)
    return index


def axes_of(axes):
    """The Axes of a call made here."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = () if mesh.empty else tuple(name for name in mesh.axis_names if name in mesh.manual_axes)
    named = _named(axes, manual)
    sizes = tuple(1 if named.get(axis) is None else mesh.shape[named[axis]] for axis in AXES)
    taken = {name for name in named.values() if name is not None}
    found = Axes(tuple(named.get(axis) for axis in AXES), sizes,
                 tuple((name, mesh.shape[name]) for name in manual if name not in taken),
                 math.prod(mesh.shape[name] for name in manual))
    _check(found, mesh, manual)
    return found


def _named(axes, manual):
    """{our axis: JAX's name}."""
    if axes is None:
        return {name: name for name in AXES if name in manual}
    if not isinstance(axes, dict):
        axes = {name: name for name in ((axes,) if isinstance(axes, str) else axes)}
    for axis, name in axes.items():
        if axis not in AXES:
            raise _c.BadInput(f"unknown axis '{axis}'; known: {', '.join(AXES)}")
        if name not in manual:
            raise _c.BadInput(f"axis '{axis}' is mesh axis '{name}', which is no manual axis here (those are:"
                              f" {', '.join(manual) or 'none'}); call inside jax.shard_map over a mesh that has it")
    if len(set(axes.values())) != len(axes):
        raise _c.BadInput(f"axes {axes} name one mesh axis twice")
    return axes


def _check(found, mesh, manual):
    if found.ranks == 1:
        return
    automatic = [name for name in mesh.axis_names if name not in manual and mesh.shape[name] > 1]
    if automatic:
        raise _c.BadInput(f"mesh axes {', '.join(automatic)} are not manual in this shard_map; attention over several devices needs"
                          " all axes manual: leave out axis_names=")
    if jax.process_count() > 1:
        raise _c.BadInput(f"{found.ranks} ranks in a job of {jax.process_count()} processes; the ranks of one call must be devices"
                          " of one process")


def threads_of(axes):
    """Threads for each device: the cores of this process, or OMP_NUM_THREADS, shared out over the mesh."""
    cores = int(os.environ.get("OMP_NUM_THREADS", "0").split(",")[0] or 0) or len(os.sched_getaffinity(0))
    return max(1, cores // axes.devices)


# ---- what varies over which axes (shard_map's check_vma) ----


def varying(array):
    """What JAX notes about it; None where it notes nothing."""
    kind = getattr(jax.typeof(array), "manual_axis_type", None)
    return kind if kind is not None and kind.varying else None


def varying_alike(*arrays):
    """The arrays, all varying over every axis that one of them varies over; None stays. What was equal on several devices gets
    the sum of its gradients over them."""
    every = set().union(*(_names(array) for array in arrays if array is not None))
    return tuple(array if array is None or not every - _names(array) else
                 jax.lax.pcast(array, tuple(sorted(every - _names(array))), to="varying") for array in arrays)


def _names(array):
    kind = varying(array)
    return frozenset() if kind is None else frozenset(kind.varying)
