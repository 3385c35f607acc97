"""What is refused, and what fails while a program runs: exceptions with the whole text, and no hang."""
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import dattn
import dattn.jax
import reference
from dattn.jax import _attention, _axes


def test_refused_while_tracing():
    q, k, v, _ = reference.inputs()
    attend = jax.jit(dattn.jax.attention, static_argnames=("mask", "layout", "strategy", "dropout_p", "axes", "timeout_s"))
    for options, text in [({"mask": "casual"}, "casual"), ({"layout": "zigzg"}, "zigzg"), ({"strategy": "rnig"}, "rnig"),
                          ({"dropout_p": 0.1}, "dropout_seed"), ({"axes": ("ring",)}, "no manual axis"),
                          ({"axes": ("rings",)}, "unknown axis"), ({"timeout_s": 0.0}, "timeout_s")]:
        with pytest.raises(dattn.BadInput, match=text):
            attend(q, k, v, **options)
    with pytest.raises(ValueError, match="float8"):
        attend(*(array.astype(jnp.float8_e4m3fn) for array in (q, k, v)))
    with pytest.raises(dattn.BadInput, match="k is bfloat16"):
        attend(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(dattn.BadInput, match="3"):
        attend(q, k[:, :, :1].repeat(3, 2), v[:, :, :1].repeat(3, 2))  # 4 heads over 3
    with pytest.raises(dattn.BadInput, match=r"\[2, 48, 4\]"):
        attend(q[..., 0], k, v)
    with pytest.raises(dattn.BadInput, match="when the program is traced"):
        jax.jit(lambda slopes: dattn.jax.attention(q, k, v, alibi_slopes=slopes))(jnp.ones(4))
    with pytest.raises(dattn.BadInput, match="bias has shape"):
        attend(q, k, v, bias=jnp.zeros((2, 4, 48, 47)))
    with pytest.raises(dattn.BadInput, match="sink has shape"):
        attend(q, k, v, sink=jnp.zeros(5))


def test_refused_in_shard_map():
    mesh = reference.make_mesh(ring=4)
    q, k, v, _ = reference.inputs()
    spec = reference.spec_of(mesh)

    def run(mesh=mesh, axis_names=frozenset(), **options):
        local = lambda *shards: dattn.jax.attention(*shards, **options)
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, axis_names=axis_names))(q, k, v)
    with pytest.raises(dattn.BadInput, match="give seq_len"):
        run()
    with pytest.raises(dattn.BadInput, match="12 rows, but of a sequence of 52"):
        run(seq_len=52)
    with pytest.raises(dattn.BadInput, match="not manual"):
        run(mesh=reference.make_mesh(ring=2, other=2), axis_names={"ring"}, seq_len=48)


def attention_without(timeout_s):
    """A function of the device that does not come, or -1, and q, k, v."""
    mesh = reference.make_mesh(ring=4)
    spec = reference.spec_of(mesh)

    def local(missing, *shards):
        attend = lambda *given: dattn.jax.attention(*given, seq_len=48, timeout_s=timeout_s, layout="contiguous")
        return jax.lax.cond(jax.lax.axis_index("ring") == missing[0], lambda q, k, v: q, attend, *shards)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(),) + (spec,) * 3, out_specs=spec))


def test_a_device_that_does_not_come():
    q, k, v, _ = reference.inputs()
    run = attention_without(timeout_s=1.5)
    reference.close(run(jnp.array([-1]), q, k, v), reference.attention(q, k, v))
    begin = time.monotonic()
    with pytest.raises(jax.errors.JaxRuntimeError, match="rank 2 of 4 did not come to the attention call within 1.5 s"):
        jax.block_until_ready(run(jnp.array([2]), q, k, v))
    assert time.monotonic() - begin < 20
    reference.close(run(jnp.array([-1]), q, k, v), reference.attention(q, k, v))  # with new communicators


def test_ctrl_c_while_waiting():
    q, k, v, _ = reference.inputs()
    run = attention_without(timeout_s=4.0)
    jax.block_until_ready(run(jnp.array([-1]), q, k, v))  # compiled
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    try:
        result = run(jnp.array([2]), q, k, v)
        with pytest.raises(KeyboardInterrupt):
            jax.block_until_ready(result)
        assert time.monotonic() - begin < 3  # before the deadline
        with pytest.raises(jax.errors.JaxRuntimeError, match="rank 2 of 4 did not come"):
            jax.block_until_ready(result)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_rank_that_fails_ends_the_call_on_all():
    """Two devices say that they are rank 0: one is refused, what the others wait for never comes."""
    mesh = reference.make_mesh(ring=4)
    q, k, v, _ = reference.inputs()
    spec = reference.spec_of(mesh)

    def local(*shards):
        found = _axes.axes_of(None)
        call = _attention.Call(found, 48, 48, '{"mask": {"kind": "causal"}}', "zigzag", "ring", "", 1.5, 1)
        place = found.place() // jnp.array([2, 1, 1], jnp.int32)
        return _attention._call_forward(call, *_axes.varying_alike(*shards, place, jnp.zeros(1, jnp.uint32)), None, None)[0]
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))
    with pytest.raises(jax.errors.JaxRuntimeError, match="two devices act as rank|rank 2, 3 of 4 did not come"):
        jax.block_until_ready(run(q, k, v))


def test_nothing_is_printed(capfd):
    q, k, v, _ = reference.inputs(seq=8)
    jax.block_until_ready(dattn.jax.attention(q, k, v))
    with pytest.raises(dattn.BadInput):
        dattn.jax.attention(q, k, v, mask="casual")
    assert capfd.readouterr() == ("", "")


def test_no_second_derivative():
    q, k, v, _ = reference.inputs(seq=8)
    first = jax.grad(lambda x: dattn.jax.attention(x, k, v).sum())
    with pytest.raises(Exception, match="differentiat"):
        jax.grad(lambda x: first(x).sum())(q)


def test_no_forward_mode_and_no_gradient_of_lse():
    q, k, v, _ = reference.inputs(seq=8)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: dattn.jax.attention(x, k, v), (q,), (q,))
    assert not jax.grad(lambda x: dattn.jax.attention(x, k, v, return_lse=True)[1].sum())(q).any()
