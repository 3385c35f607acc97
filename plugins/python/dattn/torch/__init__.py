"""dattn for PyTorch: exact attention whose heads and sequence are sharded over a DeviceMesh or process group.

    out = dattn.torch.attention(q, k, v, mask="causal", mesh=mesh)      # this rank's shards in, this rank's rows out
    x = dattn.torch.shard(x, mesh)                                      # cut batches and labels; unshard, position_ids
    with dattn.torch.sdpa(mesh): model(x)                               # models that call F.scaled_dot_product_attention

docs/plugins.md describes all of it."""
import torch._dynamo  # noqa: F401  imported after a process group is made, by an optimizer, it keeps that group from ending

from dattn import BadInput, Error, InternalError, PeerLost, SystemRefused
from dattn.torch import _ops  # noqa: F401  registers the operators
from dattn.torch._attention import attention
from dattn.torch._masks import mask_of
from dattn.torch._mesh import release_all
from dattn.torch.modules import MultiheadAttention, SelfAttention
from dattn.torch.sdpa import sdpa
from dattn.torch.sharding import position_ids, shard, unshard

__all__ = ["BadInput", "Error", "InternalError", "MultiheadAttention", "PeerLost", "SelfAttention", "SystemRefused", "attention",
           "mask_of", "position_ids", "release_all", "sdpa", "shard", "unshard"]
