"""2 and 4 devices of a shard_map."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import dattn.jax
import reference

MESHES = [{"ring": 2}, {"ulysses": 2}, {"ring": 4}, {"ring": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}, {"rows": 2, "ring": 2},
          {"ring": 2, "data": 2}, {"ring": 2, "tensor": 2}, {"ring_outer": 2, "ring": 2}]
text = lambda mesh: "_".join(f"{name}{size}" for name, size in mesh.items())


@pytest.fixture(scope="module")
def expected():
    """(inputs, outputs and gradients) by mask."""
    arrays, known = reference.inputs(), {}

    def of(mask):
        key = str(mask)
        if key not in known:
            known[key] = reference.with_gradients(lambda q, k, v: reference.attention(q, k, v, mask=mask), *arrays)
        return arrays, known[key]
    return of


@pytest.mark.parametrize("mesh", MESHES, ids=text)
def test_meshes(mesh, expected):
    arrays, want = expected("causal")
    # The sequence is cut in the order of our axes, whatever the order of the mesh's.
    reference.close(reference.with_gradients(reference.sharded(reference.make_mesh(**mesh)), *arrays), want)


@pytest.mark.parametrize("mask", ["full", reference.WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[3]], ids=text)
def test_masks(mesh, mask, expected):
    arrays, want = expected(mask)
    reference.close(reference.with_gradients(reference.sharded(reference.make_mesh(**mesh), mask=mask), *arrays), want)


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_layouts(layout, expected):
    arrays, want = expected("causal")
    reference.close(reference.with_gradients(reference.sharded(reference.make_mesh(ring=4), layout=layout), *arrays), want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_bf16_and_replicated_inputs(check_vma):
    """The sink is the same on all devices: its gradient is their sum."""
    mesh = reference.make_mesh(ring=2, ulysses=2)
    q, k, v, dout = reference.inputs(dtype=jnp.bfloat16)
    sink = jnp.array([0.5, -1, 2, 0])
    spec, whole = reference.spec_of(mesh), PartitionSpec()
    local = jax.shard_map(lambda q, k, v, s: dattn.jax.attention(q, k, v, sink=s, seq_len=48, layout="contiguous"), mesh=mesh,
                          in_specs=(spec, spec, spec, whole), out_specs=spec, check_vma=check_vma)
    gradients = lambda attend: jax.jit(jax.grad(lambda s, x: (attend(x, k, v, s) * dout).astype(jnp.float32).sum(), (0, 1)))(sink, q)
    got = gradients(local)
    assert got[1].dtype == jnp.bfloat16
    reference.close(got, gradients(lambda q, k, v, s: dattn.jax.attention(q, k, v, sink=s)), 1e-2)
    plain = reference.with_gradients(reference.sharded(mesh, check_vma), q, k, v, dout)
    wide = [array.astype(jnp.float32) for array in (q, k, v, dout)]
    reference.close(plain, reference.with_gradients(reference.attention, *wide), 1e-2)


def test_a_length_that_does_not_divide():
    arrays = reference.inputs(seq=43)
    for mesh in (reference.make_mesh(ring=4), reference.make_mesh(ring=2, ulysses=2)):
        reference.close(reference.with_gradients(reference.sharded(mesh), *arrays),
                        reference.with_gradients(reference.attention, *arrays))
    # Rows of padding hold zeros, whatever came in.
    mesh, spec = reference.make_mesh(ring=4), PartitionSpec(None, "ring")
    local = jax.shard_map(lambda *shards: dattn.jax.attention(*shards, seq_len=43), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    arranged = [dattn.jax.arrange(x, mesh, fill=jnp.nan) for x in arrays]
    padding = dattn.jax.arrange(jnp.ones((1, 43)), mesh)[0] == 0
    assert padding.sum() == 1
    for result in reference.with_gradients(local, *arranged):
        assert (result[:, padding] == 0).all() and jnp.isfinite(result).all()


def test_vmap_and_scan_over_devices():
    mesh = reference.make_mesh(ring=2, ulysses=2)
    many = [jnp.stack(arrays) for arrays in zip(*(reference.inputs(kv_heads=4, seed=seed) for seed in range(2)))]
    reference.close(reference.with_gradients(jax.vmap(reference.sharded(mesh)), *many),
                    reference.with_gradients(jax.vmap(reference.attention), *many))
    q, k, v, dout = (array[0] for array in many)
    spec = reference.spec_of(mesh)

    def layers(attend):
        return lambda x, y, z: jax.lax.scan(lambda h, _: (h + attend(h, y, z), None), x, None, length=3)[0]
    local = jax.shard_map(layers(lambda *shards: dattn.jax.attention(*shards, seq_len=48, layout="contiguous")), mesh=mesh,
                          in_specs=(spec,) * 3, out_specs=spec)
    reference.close(reference.with_gradients(local, q, k, v, dout),
                    reference.with_gradients(layers(reference.attention), q, k, v, dout))


def test_calls_that_do_not_depend_on_each_other():
    """XLA may start them in another order on each device; equal ones come from one traced function."""
    mesh = reference.make_mesh(ring=4)
    many = [reference.inputs(seed=seed) for seed in range(6)]
    spec = reference.spec_of(mesh)
    one = jax.jit(lambda q, k, v: dattn.jax.attention(q, k, v, seq_len=48, layout="contiguous"))
    local = jax.jit(jax.shard_map(lambda given: [jax.lax.psum(one(*qkv).sum(), "ring") + one(*qkv) for qkv in given], mesh=mesh,
                                  in_specs=spec, out_specs=spec))
    given = [arrays[:3] for arrays in many]
    want = [out.sum() + out for out in (reference.attention(*qkv) for qkv in given)]
    started = [local(given) for _ in range(5)]  # executions are not waited for
    for got in started:
        reference.close(got, want, 1e-4)


def test_dropout_is_the_same_on_every_mesh():
    q, k, v, _ = reference.inputs(batch=4)
    want = dattn.jax.attention(q, k, v, dropout_p=0.4, dropout_seed=9)
    for mesh in (reference.make_mesh(ring=4), reference.make_mesh(data=2, ulysses=2)):
        reference.close(jax.jit(reference.sharded(mesh, dropout_p=0.4, dropout_seed=9))(q, k, v), want)


def test_axes_of_other_names_and_explicit_meshes():
    mesh = jax.make_mesh((2, 2), ("model", "context"))  # axes are Explicit unless said otherwise
    q, k, v, _ = reference.inputs()
    spec = PartitionSpec(None, "context", "model")
    local = jax.shard_map(lambda *shards: dattn.jax.attention(*shards, seq_len=48, axes={"ring": "context", "tensor": "model"}),
                          mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    given = [jax.device_put(dattn.jax.arrange(x, 2), NamedSharding(mesh, spec)) for x in (q, k, v)]
    reference.close(dattn.jax.restore(jax.device_get(local(*given)), 2, seq_len=48), reference.attention(q, k, v))


def test_shard_unshard_and_position_ids():
    mesh = reference.make_mesh(ring=2, ulysses=2)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 10, 3)), jnp.float32)
    weights = jnp.arange(10.0)[None, :, None]
    cut = PartitionSpec(None, ("ring", "ulysses"))

    def local(whole):
        mine = dattn.jax.shard(whole)
        ids = dattn.jax.position_ids(seq_len=10)
        back = dattn.jax.unshard(mine * ids[None, :, None], seq_len=10)
        return mine, ids, back[None]
    run = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(),
                        out_specs=(cut, PartitionSpec(("ring", "ulysses")), PartitionSpec(("ring", "ulysses"))))
    mine, ids, back = jax.jit(run)(x)
    assert ids.tolist() == [0, 1, 9, 2, 3, 8, 4, 7, -1, 5, 6, -1]  # two of eight chunks each; -1: padding
    reference.close(mine, dattn.jax.arrange(x, mesh))
    reference.close(dattn.jax.restore(mine, mesh, seq_len=10), x)
    reference.close(back, jnp.stack([x * weights] * 4))
    # Each device's whole is used: the gradient is the sum over the four.
    reference.close(jax.jit(jax.grad(lambda given: run(given)[2].sum()))(x), jnp.broadcast_to(4 * weights, x.shape))


def test_balanced_layout():
    mesh, mask = reference.make_mesh(ring=4), {"kind": "documents", "cu_seqlens": [0, 7, 40, 48], "within": "causal"}
    q, k, v, _ = reference.inputs()
    spec = reference.spec_of(mesh)
    local = jax.shard_map(lambda *shards: dattn.jax.attention(*shards, seq_len=48, mask=mask, layout="balanced"), mesh=mesh,
                          in_specs=(spec,) * 3, out_specs=spec)
    arranged = [dattn.jax.arrange(x, mesh, layout="balanced", mask=mask) for x in (q, k, v)]
    got = dattn.jax.restore(local(*arranged), mesh, seq_len=48, layout="balanced", mask=mask)
    reference.close(got, dattn.jax.attention(q, k, v, mask=mask))
