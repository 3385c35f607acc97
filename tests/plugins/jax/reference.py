"""jax.nn.dot_product_attention, and inputs for it: what the tests compare with."""
import jax
import jax.numpy as jnp
import numpy as np

import dattn.jax

AUTO = jax.sharding.AxisType.Auto
WINDOW = {"kind": "window", "left": 9, "right": 3}


def attention(q, k, v, mask="causal", **options):
    """Masks as dattn names them."""
    kind = mask if isinstance(mask, str) else mask["kind"]
    if kind == "window":
        options["local_window_size"] = (mask["left"], mask["right"])
    return jax.nn.dot_product_attention(q, k, v, is_causal=kind == "causal", **options)


def inputs(batch=2, seq=48, heads=4, kv_heads=2, dim=16, dtype=jnp.float32, keys=None, seed=3):
    """q, k, v, dout."""
    draw = np.random.default_rng(seed).standard_normal
    shapes = [(batch, seq, heads, dim), *[(batch, keys or seq, kv_heads, dim)] * 2, (batch, seq, heads, dim)]
    return tuple(jnp.asarray(draw(shape), dtype) for shape in shapes)


def close(got, want, tolerance=1e-5):
    """Relative error of whole arrays, or of each of several."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.shape == other.shape, f"{one.shape} is not {other.shape}"
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        error = np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30)
        assert error <= tolerance, f"relative error {error:.2e}"


def with_gradients(function, q, k, v, dout):
    """Output and gradients of q, k, v, in one program."""
    def run(*qkv):
        out, pull = jax.vjp(function, *qkv)
        return (out, *pull(dout.astype(out.dtype)))
    return jax.jit(run)(q, k, v)


def make_mesh(**sizes):
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AUTO,) * len(sizes), devices=jax.devices()[:count])


def spec_of(mesh):
    """[batch, seq, heads, dim] cut over the mesh's axes."""
    present = lambda *names: tuple(name for name in names if name in mesh.shape) or None
    return jax.sharding.PartitionSpec(present("data"), present("ring_outer", "ring", "rows", "ulysses"), present("tensor"))


def sharded(mesh, check_vma=True, layout="zigzag", **options):
    """dattn.jax.attention over the mesh as a function of whole arrays."""
    def run(q, k, v):
        seq, keys, spec = q.shape[1], k.shape[1], spec_of(mesh)
        local = jax.shard_map(lambda *shards: dattn.jax.attention(*shards, seq_len=seq, seq_len_kv=keys, layout=layout, **options),
                              mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma)
        out = local(*(dattn.jax.arrange(x, mesh, layout=layout) for x in (q, k, v)))
        return dattn.jax.restore(out, mesh, seq_len=seq, layout=layout)
    return run
