"""One device: values, gradients, and JAX's transformations."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dattn.jax
import reference


def ours(**options):
    return lambda q, k, v: dattn.jax.attention(q, k, v, **options)


def theirs(**options):
    return lambda q, k, v: reference.attention(q, k, v, **options)


@pytest.mark.parametrize("mask", ["full", "causal", reference.WINDOW], ids=["full", "causal", "window"])
def test_equals_dot_product_attention(mask):
    arrays = reference.inputs()
    reference.close(reference.with_gradients(ours(mask=mask), *arrays), reference.with_gradients(theirs(mask=mask), *arrays))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 1e-2), (jnp.float16, 1.3e-3)], ids=["bf16", "fp16"])
def test_half_precision(dtype, tolerance):
    arrays = reference.inputs(dtype=dtype)
    got = reference.with_gradients(ours(), *arrays)
    assert all(array.dtype == dtype for array in got)
    wide = [array.astype(jnp.float32) for array in arrays]
    reference.close(got, reference.with_gradients(theirs(), *wide), tolerance)


def test_float64():
    def formula(q, k, v):  # JAX's own takes the softmax in float32
        scores = jnp.einsum("bshd,bthd->bhst", q, jnp.repeat(k, 2, 2)) / 4
        weights = jax.nn.softmax(jnp.where(jnp.tri(13, dtype=bool), scores, -jnp.inf), -1)
        return jnp.einsum("bhst,bthd->bshd", weights, jnp.repeat(v, 2, 2))
    with jax.enable_x64(True):
        arrays = reference.inputs(seq=13, dtype=jnp.float64)
        got = reference.with_gradients(ours(), *arrays)
        assert all(array.dtype == jnp.float64 for array in got)
        reference.close(got, reference.with_gradients(formula, *arrays), 1e-12)
        narrow = [array.astype(jnp.float32) for array in arrays]  # float32 where float64 is allowed
        out, lse = dattn.jax.attention(*narrow[:3], return_lse=True)
        assert out.dtype == lse.dtype == jnp.float32
        reference.close(out, got[0])


def test_without_jit_and_without_batch():
    q, k, v, _ = reference.inputs()
    want = reference.attention(q, k, v)
    reference.close(dattn.jax.attention(q, k, v), want)
    reference.close(dattn.jax.attention(q[0], k[0], v[0]), want[0])


def test_keys_of_another_length_and_scale():
    arrays = reference.inputs(seq=10, keys=23)
    reference.close(reference.with_gradients(ours(mask=None, scale=0.3), *arrays),
                    reference.with_gradients(theirs(mask="full", scale=0.3), *arrays))


def test_lse_and_sink():
    q, k, v, _ = reference.inputs()
    scores = jnp.einsum("bshd,bthd->bhst", q, jnp.repeat(k, 2, 2)) / 4
    _, lse = dattn.jax.attention(q, k, v, mask="full", return_lse=True)
    reference.close(lse, jax.nn.logsumexp(scores, -1))

    def with_sink(sink):  # one more key without a value
        wide = jnp.concatenate([scores, jnp.broadcast_to(sink[None, :, None, None], (*scores.shape[:3], 1))], -1)
        return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(wide, -1)[..., :-1], jnp.repeat(v, 2, 2))
    sink = jnp.array([0.5, -1, 2, 0])
    run = lambda given: dattn.jax.attention(q, k, v, mask="full", sink=given)
    reference.close(run(sink), with_sink(sink))
    square = lambda function: jax.grad(lambda given: (function(given) ** 2).sum())
    reference.close(square(run)(sink), square(with_sink)(sink))


@pytest.mark.parametrize("shape", [(2, 4, 48, 48), (1, 4, 48, 48), (1, 1, 48, 48)])
def test_bias(shape):
    q, k, v, dout = reference.inputs()
    bias = jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)
    gradients = lambda attend: jax.jit(jax.grad(lambda b, x: (attend(x, k, v, mask="causal", bias=b) * dout).sum(), (0, 1)))(bias, q)
    reference.close(gradients(dattn.jax.attention), gradients(reference.attention))


def test_softcap_alibi_and_masks_as_dicts():
    q, k, v, _ = reference.inputs()
    slopes = np.array([0.5, 0.25, 0.125, 0.0625])
    got = dattn.jax.attention(q, k, v, mask={"kind": "documents", "cu_seqlens": np.array([0, 20, 48])}, softcap=3.0,
                              alibi_slopes=slopes)
    number = jnp.arange(48) >= 20
    d = jnp.arange(48)[None, :] - jnp.arange(48)[:, None]
    scores = 3 * jnp.tanh(jnp.einsum("bshd,bthd->bhst", q, jnp.repeat(k, 2, 2)) / 4 / 3) + slopes[:, None, None] * d
    weights = jax.nn.softmax(jnp.where(number[:, None] == number[None, :], scores, -jnp.inf), -1)
    reference.close(got, jnp.einsum("bhst,bthd->bshd", weights, jnp.repeat(v, 2, 2)))


def test_dropout_is_keyed_by_seed():
    q, k, v, _ = reference.inputs()
    run = jax.jit(lambda seed: dattn.jax.attention(q, k, v, dropout_p=0.5, dropout_seed=seed))
    assert np.array_equal(run(7), run(7)) and not np.array_equal(run(7), run(8))
    mean = np.mean([run(seed) for seed in range(200)], 0)
    reference.close(mean, reference.attention(q, k, v), 0.15)


def test_dropout_and_its_gradients():
    """Against the formula with the pairs that are kept, which equal weights over values of the unit matrix show."""
    arrays = reference.inputs()
    q, k, v, _ = arrays
    drop = {"mask": "full", "dropout_p": 0.4, "dropout_seed": 9}
    unit = jnp.broadcast_to(jnp.eye(48)[None, :, None, :], (2, 48, 2, 48))
    keep = 48 * dattn.jax.attention(jnp.zeros_like(q), jnp.zeros_like(k), unit, **drop)  # [batch, seq, heads, keys]
    kept = jnp.abs(keep - 1 / 0.6) < 1e-5
    assert (kept | (keep == 0)).all() and abs(kept.mean() - 0.6) < 0.02

    def formula(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bshd,bthd->bsht", q, jnp.repeat(k, 2, 2)) / 4, -1)
        return jnp.einsum("bsht,bthd->bshd", weights * keep, jnp.repeat(v, 2, 2))
    reference.close(reference.with_gradients(ours(**drop), *arrays), reference.with_gradients(formula, *arrays))


@pytest.mark.parametrize("mapped", ["all", "queries", "nested"])
def test_vmap(mapped):
    many = [jnp.stack(arrays) for arrays in zip(*(reference.inputs(seq=12, seed=seed) for seed in range(3)))]
    if mapped == "nested":
        many = [jnp.stack([array, 2 * array]) for array in many]
    q, k, v, dout = many
    if mapped == "queries":
        k, v = k[0], v[0]

    def mapped_attention(attend):
        one = jax.vmap(lambda *qkv: attend(*qkv, mask=reference.WINDOW), in_axes=(0, None, None) if mapped == "queries" else 0)
        return jax.vmap(one) if mapped == "nested" else one
    reference.close(reference.with_gradients(mapped_attention(dattn.jax.attention), q, k, v, dout),
                    reference.with_gradients(mapped_attention(reference.attention), q, k, v, dout))


def test_vmap_with_bias_sink_padding_and_seeds():
    q, k, v, dout = (jnp.stack(arrays) for arrays in zip(*(reference.inputs(seq=12, seed=seed) for seed in range(3))))
    bias = jnp.asarray(np.random.default_rng(5).standard_normal((1, 4, 12, 12)), jnp.float32)
    sink = jnp.array([0.5, -1, 2, 0])
    mask = {"kind": "padding", "lengths": [12, 7], "within": "causal"}

    def gradients(sinks, seeds, **options):
        def call(x, y, z, d, b, s, seed):
            loss = lambda b, s, x: (dattn.jax.attention(x, y, z, bias=b, sink=s, dropout_seed=seed, **options) * d).sum()
            return jax.value_and_grad(loss, (0, 2) if s is None else (0, 1, 2))(b, s, x)
        mapped = jax.jit(jax.vmap(call, in_axes=(0, 0, 0, 0, None, 0 if sinks is not None and sinks.ndim == 2 else None,
                                             None if seeds is None else 0)))
        one = jax.jit(call)
        alone = [one(q[i], k[i], v[i], dout[i], bias, sinks if sinks is None or sinks.ndim == 1 else sinks[i],
                     None if seeds is None else seeds[i]) for i in range(3)]
        return mapped(q, k, v, dout, bias, sinks, seeds), jax.tree.map(lambda *rows: jnp.stack(rows), *alone)
    for sinks in (None, sink, jnp.stack([sink, 2 * sink, -sink])):
        reference.close(*gradients(sinks, None, mask=mask))
    reference.close(*gradients(sink, jnp.arange(3), mask=mask, dropout_p=0.3))


def test_scan_checkpoint_and_a_graph_used_twice():
    q, k, v, dout = reference.inputs(kv_heads=4)

    def stack(attend):
        layer = jax.checkpoint(lambda x, _: (x + attend(x, k, v, mask="causal"), None))
        return lambda x: (jax.lax.scan(layer, x, None, length=3)[0] * dout).sum()
    reference.close(jax.jit(jax.grad(stack(dattn.jax.attention)))(q), jax.jit(jax.grad(stack(reference.attention)))(q))
    _, pull = jax.vjp(lambda x: dattn.jax.attention(x, k, v), q)
    assert np.array_equal(pull(dout)[0], pull(dout)[0])


def test_devices_without_a_sequence_axis_work_side_by_side():
    mesh = reference.make_mesh(data=4)
    arrays = reference.inputs(batch=8)
    reference.close(reference.with_gradients(reference.sharded(mesh), *arrays), reference.with_gradients(theirs(), *arrays))
