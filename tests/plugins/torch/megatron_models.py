"""Small GPT models of Megatron-Core on any mesh of tensor, context and data parallel ranks, and their gradients put together."""
import warnings

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import get_batch_on_this_cp_rank

import dattn.megatron
import dattn.torch
import reference

B, S, VOCAB = 4, 32, 64
_groups = []  # what Megatron made for the mesh of now


class Formula(torch.nn.Module):
    """A core attention of one rank, written out."""

    def __init__(self, config, softmax_scale=None, **_):
        super().__init__()
        self.config, self.scale = config, softmax_scale

    def forward(self, query, key, value, attention_mask=None, **_):
        left, right = self.config.window_size or (-1, 0)
        mask = {"kind": "window", "left": None if left < 0 else left, "right": right}
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return reference.attention(query, key, value, mask, self.scale)[0].transpose(0, 1).flatten(2)


def initialize(tp=1, cp=1, hierarchical=None):
    """The groups of a mesh; what remains of the ranks is data parallel."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    dattn.torch.release_all()
    while _groups:  # each has threads of its own
        dist.destroy_process_group(_groups.pop())
    before = set(dist.distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp,
                                             hierarchical_context_parallel_sizes=hierarchical, create_gloo_process_groups=False)
    _groups.extend(group for group in dist.distributed_c10d._world.pg_map if group not in before)


def model(core_attention=dattn.megatron.CoreAttention, spec=None, seq=S, **options):
    """With the same weights on every mesh. spec: of a layer, with its core attention; seq: the longest batch."""
    torch.manual_seed(3)
    config = TransformerConfig(**{**dict(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, init_method_std=0.2, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size()), **options})
    if spec is None:
        spec = get_gpt_layer_local_spec()
        spec.submodules.self_attention.submodules.core_attention = core_attention
    return GPTModel(config, spec, vocab_size=VOCAB, max_sequence_length=seq, position_embedding_type="learned_absolute")


def batch(seq=S, rows=B):
    """Of all ranks, as Megatron names it."""
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(VOCAB, (rows, seq + 1), generator=generator)
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": (torch.rand(rows, seq, generator=generator) > 0.2).float(),
            "position_ids": torch.arange(seq).expand(rows, seq), "attention_mask": None}


def own_part(whole):
    """This rank's part of a batch: rows by data rank, positions as Megatron cuts them."""
    index, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return get_batch_on_this_cp_rank({name: None if value is None else value.chunk(ranks)[index].contiguous()
                                      for name, value in whole.items()})


def step(net, part, total, packed=None):
    """(loss, {parameter: gradient}) of all ranks together; total: positions in the whole batch that count."""
    for parameter in net.parameters():
        parameter.grad = None
    torch.manual_seed(9)  # what dropout draws
    losses = net(part["tokens"], part["position_ids"], part["attention_mask"], labels=part["labels"], packed_seq_params=packed)
    loss = (losses * part["loss_mask"]).sum() / total
    loss.backward()
    loss = loss.detach()
    together = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(loss, group=together)
    gradients = {}
    for name, parameter in net.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=together)
        gradients[name] = _over_tensor_ranks(gradient, parameter, name)
    return loss, gradients


def _over_tensor_ranks(gradient, parameter, name):
    group = parallel_state.get_tensor_model_parallel_group()
    cut = getattr(parameter, "tensor_model_parallel", False) or name.endswith("softmax_offset")
    if group.size() == 1 or not cut:
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(group.size())]
    dist.all_gather(parts, gradient, group=group)
    return torch.cat(parts, 0 if name.endswith("softmax_offset") else parameter.partition_dim)


def one_process(core_attention=dattn.megatron.CoreAttention, packed=None, seq=S, rows=B, **options):
    """What one process makes of the whole batch; every rank is that process."""
    initialize()
    net, whole = model(core_attention, seq=seq, **options), batch(seq, rows)
    total = whole["loss_mask"].sum()
    for parameter in net.parameters():
        parameter.grad = None
    torch.manual_seed(9)
    losses = net(whole["tokens"], whole["position_ids"], None, labels=whole["labels"], packed_seq_params=packed)
    loss = (losses * whole["loss_mask"]).sum() / total
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in net.named_parameters()}


def compare(got, want, tolerance=2e-5):
    reference.close(got[0], want[0], 1e-6)
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        reference.close(got[1][name], want[1][name], tolerance)
