"""A sequence cut by a layout: arrange and restore for whole arrays outside shard_map; shard, unshard, position_ids inside.

Every device's array has as many rows as the longest shard; where the length does not divide, the last rows of some are padding,
with position -1."""
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from dattn import _c
from dattn.jax._axes import AXES, SEQUENCE_AXES, axes_of
from dattn.jax._call import plain_mask, positions


def arrange(x, mesh, axis=1, *, layout="zigzag", mask=None, axes=None, fill=0):
    """The rows of `axis` of the whole x in the order that shard_map cuts: the devices' rows behind each other, so that
    in_specs=PartitionSpec(None, ("ring", "ulysses")) gives each its own. Padding is `fill`.
    mesh: a jax Mesh (axes as in attention), or the number of devices along the sequence. mask: needed by layout balanced."""
    axis = _axis(x, axis)
    return _take(x, _slots(_parts(mesh, axes), layout, x.shape[axis], mask).reshape(-1), axis, fill)


def restore(x, mesh, axis=1, *, seq_len, layout="zigzag", mask=None, axes=None):
    """What arrange was given: the rows in the sequence's order, without padding."""
    axis = _axis(x, axis)
    return _take(x, _inverse(_slots(_parts(mesh, axes), layout, seq_len, mask)), axis, 0)


def position_ids(*, seq_len, layout="zigzag", mask=None, axes=None):
    """[rows] int32: the positions of this device's rows; -1 for padding."""
    found = axes_of(axes)
    return jnp.asarray(_slots(found.sequence_parts, layout, seq_len, mask))[found.sequence_index()]


def shard(x, axis=1, *, layout="zigzag", mask=None, axes=None, fill=0):
    """This device's rows of `axis` of the whole x, which all devices of the sequence hold. Local; its gradient is zero outside
    these rows."""
    axis = _axis(x, axis)
    return _take(x, position_ids(seq_len=x.shape[axis], layout=layout, mask=mask, axes=axes), axis, fill)


def unshard(x, axis=1, *, seq_len, layout="zigzag", mask=None, axes=None):
    """The whole of which x is this device's rows of `axis`, on every device. Its gradient is this device's rows of the sum over
    the devices, as of jax.lax.all_gather."""
    axis = _axis(x, axis)
    found = axes_of(axes)
    slots = _slots(found.sequence_parts, layout, seq_len, mask)
    if x.shape[axis] != slots.shape[1]:
        raise _c.BadInput(f"unshard: axis {axis} has {x.shape[axis]} rows, but each of {found.sequence_parts} devices holds"
                          f" {slots.shape[1]} of {seq_len}")
    if found.sequence_names:
        x = jax.lax.all_gather(x, found.sequence_names, axis=axis, tiled=True)
    return _take(x, _inverse(slots), axis, 0)


def _slots(parts, layout, seq_len, mask):
    """[parts, rows] int32: the position of each row of each part; -1 for padding."""
    held = positions(parts, layout, seq_len, None if mask is None else json.dumps(plain_mask(mask)))
    slots = np.full((parts, max(len(part) for part in held)), -1, np.int32)
    for row, part in zip(slots, held):
        row[:len(part)] = part
    return slots


def _inverse(slots):
    """[seq_len] int32: where in the slots each position stands."""
    flat = slots.reshape(-1)
    return np.argsort(np.where(flat < 0, np.iinfo(np.int32).max, flat), kind="stable")[:int((flat >= 0).sum())].astype(np.int32)


def _take(x, index, axis, fill):
    """Rows by index; -1 gives `fill`."""
    index = jnp.where(index < 0, x.shape[axis], index)
    return jnp.take(x, index, axis=axis, mode="fill", fill_value=fill)


def _parts(mesh, axes):
    if isinstance(mesh, int):
        return mesh
    if axes is None:
        names = [name for name in SEQUENCE_AXES if name in mesh.shape]
    else:
        names = axes.values() if isinstance(axes, dict) else (axes,) if isinstance(axes, str) else axes
        names = [name for ours, name in (axes.items() if isinstance(axes, dict) else zip(names, names)) if ours in SEQUENCE_AXES]
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise _c.BadInput(f"the mesh has axes {', '.join(mesh.axis_names)}, but not {', '.join(unknown)}; ours are {', '.join(AXES)}")
    return math.prod(mesh.shape[name] for name in names)


def _axis(x, axis):
    if not -x.ndim <= axis < x.ndim:
        raise _c.BadInput(f"axis is {axis}, but x has shape {list(x.shape)}")
    return axis % x.ndim
