"""dattn for Transformers: attn_implementation="dattn".

    dattn.transformers.register(mesh=mesh)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dattn")
    loss = model(**dattn.transformers.shard_batch(batch, mesh)).loss    # this rank's part: sum over the ranks

docs/plugins.md describes all of it."""
import functools

from transformers import AttentionInterface, AttentionMaskInterface

from dattn import _c
from dattn.transformers._attention import Settings, attend, make_mask
from dattn.transformers._batches import shard_batch
from dattn.transformers._trainer import ShardedTrainer

__all__ = ["ShardedTrainer", "register", "shard_batch"]

ACTIVATIONS = ("sharded", "replicated")


def register(mesh=None, *, name="dattn", layout="zigzag", strategy="auto", activations="sharded", determinism=None, timeout_s=None):
    """Registers an attention implementation, and the mask that goes with it; again under the same name = anew.

    mesh, layout, strategy, determinism, timeout_s: as dattn.torch.attention has them.
    activations: "sharded": the model sees this rank's rows of the batch, which shard_batch prepares. "replicated": every rank
        runs the whole model, and attention alone is shared out: for models that mix positions elsewhere (ViT, Whisper, pooled
        encoders), and for generate()."""
    if activations not in ACTIVATIONS:
        raise _c.BadInput(f"activations is '{activations}'; known: {', '.join(ACTIVATIONS)}")
    settings = Settings(mesh, layout, strategy, activations, determinism, timeout_s)
    settings.spec()  # refuses a mesh that is none
    AttentionInterface.register(name, functools.partial(attend, settings))
    AttentionMaskInterface.register(name, functools.partial(make_mask, settings))
