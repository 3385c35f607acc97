"""dattn for JAX: exact attention whose heads and sequence are sharded over the devices of a mesh.

    out = dattn.jax.attention(q, k, v, mask="causal")                   # on one device, in place of jax.nn.dot_product_attention

    def step(q, k, v):                                                  # inside shard_map: this device's shards in and out
        return dattn.jax.attention(q, k, v, seq_len=seq)
    jax.shard_map(step, mesh=jax.make_mesh((2, 2), ("ring", "ulysses")), ...)

arrange and restore order whole arrays by a layout before and after shard_map; shard, unshard and position_ids do it inside.
docs/plugins.md describes all of it."""
from dattn import BadInput, Error, InternalError, PeerLost, SystemRefused
from dattn.jax._attention import attention
from dattn.jax.sharding import arrange, position_ids, restore, shard, unshard

__all__ = ["BadInput", "Error", "InternalError", "PeerLost", "SystemRefused", "arrange", "attention", "position_ids", "restore",
           "shard", "unshard"]
