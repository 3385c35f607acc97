"""Trains a small causal language model on sequences that are cut over the devices of a mesh.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python long_context.py --ring 2 --ulysses 2

Everything but attention is local to a row, so that the model is written for the rows a device holds: it takes their tokens and
positions, and attention alone crosses devices. Parameters are the same on all devices; shard_map adds up their gradients."""
import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import dattn.jax

VOCAB, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


def init(key):
    draw = lambda shape: 0.1 * jax.random.normal(next(keys), shape)
    keys = iter(jax.random.split(key, 2 + 4 * LAYERS))
    layers = [{"qkv": draw((WIDTH, 3, HEADS, WIDTH // HEADS)), "out": draw((HEADS, WIDTH // HEADS, WIDTH)),
               "up": draw((WIDTH, 4 * WIDTH)), "down": draw((4 * WIDTH, WIDTH))} for _ in range(LAYERS)]
    return {"embed": draw((VOCAB, WIDTH)), "head": draw((WIDTH, VOCAB)), "layers": layers}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rope(x, positions):
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 1e4 ** (-jnp.arange(half) / half)
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * jnp.cos(angles) - two * jnp.sin(angles), one * jnp.sin(angles) + two * jnp.cos(angles)], -1)


def loss_sum(params, tokens, labels, seq):
    """Of this device's rows [B, S]. Labels were shifted before the sequence was cut; -1 has none."""
    positions = dattn.jax.position_ids(seq_len=seq)
    x = params["embed"][tokens]
    for layer in params["layers"]:
        q, k, v = jnp.moveaxis(jnp.einsum("bsw,wchd->bschd", norm(x), layer["qkv"]), 2, 0)
        attended = dattn.jax.attention(rope(q, positions), rope(k, positions), v, mask="causal", seq_len=seq)
        x = x + jnp.einsum("bshd,hdw->bsw", attended, layer["out"])
        x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
    scores = jax.nn.log_softmax(norm(x) @ params["head"])
    return -jnp.where(labels >= 0, jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], -1)[..., 0], 0).sum()


def train(mesh, seq, steps):
    rows = P("data" if "data" in mesh.shape else None, ("ring", "ulysses"))

    def step(params, tokens):
        labels = jnp.concatenate([tokens[:, 1:], jnp.full((2, 1), -1)], 1)

        def loss(given):
            local = jax.shard_map(lambda *args: jax.lax.psum(loss_sum(*args, seq), mesh.axis_names), mesh=mesh,
                                  in_specs=(P(), rows, rows), out_specs=P())
            total = local(given, dattn.jax.arrange(tokens, mesh), dattn.jax.arrange(labels, mesh, fill=-1))
            return total / (labels >= 0).sum()
        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients), value

    step, params, losses = jax.jit(step), jax.jit(init)(jax.random.key(0)), []
    draw = np.random.default_rng(0)
    for _ in range(steps):
        tokens = (draw.integers(VOCAB, size=(2, 1)) + np.arange(seq) * 5) % VOCAB
        params, value = step(params, tokens)
        losses.append(float(value))
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ring", type=int, default=2)
    parser.add_argument("--ulysses", type=int, default=2)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compare", action="store_true", help="train on one device, too")
    args = parser.parse_args()

    def mesh(ring, ulysses):
        return jax.make_mesh((ring, ulysses), ("ring", "ulysses"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                             devices=jax.devices()[:ring * ulysses])
    losses = train(mesh(args.ring, args.ulysses), args.seq, args.steps)
    for number, loss in enumerate(losses):
        print(f"step {number} loss {loss:.4f}")
    if args.compare:
        alone = train(mesh(1, 1), args.seq, args.steps)
        worst = max(abs(one - other) for one, other in zip(losses, alone))
        print("same losses on one device" if worst < 1e-3 else f"losses differ by {worst} from those on one device")


if __name__ == "__main__":
    main()
