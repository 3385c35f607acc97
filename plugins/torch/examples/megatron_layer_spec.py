"""Trains Megatron-Core's GPTModel with its core attention replaced, on tensor, context and data parallel ranks.

    torchrun --nproc-per-node 4 plugins/torch/examples/megatron_layer_spec.py --tensor 2 --context 2 --comm-type a2a

One line of the layer spec differs. Megatron cuts the batch (get_batch_on_this_cp_rank) and sums gradients as ever. It runs on
CPUs over gloo; there Megatron's own core attention does not. The losses are those of one process."""
import argparse
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

import dattn.megatron


def make_model(given):
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = dattn.megatron.CoreAttention
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, tensor_model_parallel_size=given.tensor,
        context_parallel_size=given.context, cp_comm_type=given.comm_type, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, masked_softmax_fusion=False, gradient_accumulation_fusion=False)
    # Rotary embeddings of context parallel ranks are moved to a GPU by Megatron; on CPUs, positions are learned.
    return GPTModel(config, spec, vocab_size=256, max_sequence_length=given.seq, position_embedding_type="learned_absolute")


def make_batch(text, seq, rows):
    begin = torch.randint(len(text) - seq - 1, (rows,))
    pieces = torch.stack([text[at:at + seq + 1] for at in begin])
    return {"tokens": pieces[:, :-1], "labels": pieces[:, 1:], "position_ids": torch.arange(seq).expand(rows, seq)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--comm-type", default="p2p")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:  # without torchrun: one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=given.tensor, context_parallel_size=given.context)
    torch.manual_seed(0)  # the same weights and batches on every rank
    model = make_model(given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(open(__file__, "rb").read()))
    data_index, data_ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    together = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for step in range(given.steps):
        whole = make_batch(text, given.seq, rows=4)
        part = get_batch_on_this_cp_rank({name: tensor.chunk(data_ranks)[data_index].contiguous() for name, tensor in whole.items()})
        losses = model(part["tokens"], part["position_ids"], None, labels=part["labels"])  # of each position
        loss = losses.sum() / whole["labels"].numel()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=together)
        dist.all_reduce(loss, group=together)
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)
    dattn.torch.release_all()  # it holds the process groups, whose threads are to end before the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
