"""Tensor parallel linears of PyTorch x ulysses x ring of dattn, and FSDP2 around it: 8 ranks, or any product.

    torchrun --nproc-per-node 8 plugins/torch/examples/tensor_parallel.py --ring 2 --ulysses 2 --tensor 2

`parallelize_module` shards the projections over `tensor`: a rank's q, k, v are its heads. Attention shards the sequence over
ring and ulysses. `fully_shard` keeps each parameter in pieces over the ranks that would hold copies of it (data, ring,
ulysses), and averages gradients over them; the loss of a rank's rows is scaled so that the average is the gradient of the
whole batch's loss. The losses are those of one process."""
import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dattn.torch


class Block(nn.Module):
    def __init__(self, dim, head_dim, mesh, seq_len):
        super().__init__()
        self.head_dim, self.mesh, self.seq_len = head_dim, mesh, seq_len
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):  # [batch, rows, dim]
        h = self.norm1(x)
        q, k, v = (linear(h).unflatten(-1, (-1, self.head_dim)) for linear in (self.query, self.key, self.value))
        mixed = dattn.torch.attention(q, k, v, mask="causal", mesh=self.mesh, seq_len=self.seq_len)
        x = x + self.out(mixed.flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, dim, head_dim, layers, mesh, seq_len):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, dim), nn.Embedding(seq_len, dim)
        self.blocks = nn.ModuleList(Block(dim, head_dim, mesh, seq_len) for _ in range(layers))
        self.head = nn.Linear(dim, 256)

    def forward(self, ids, positions):
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def parallelize(model, mesh):
    """Tensor parallel projections, then FSDP over the other dimensions as one."""
    plan = {name: ColwiseParallel() for name in ("query", "key", "value", "up")}
    plan.update({name: RowwiseParallel() for name in ("out", "down")})
    replicas = mesh["ring", "ulysses"]._flatten("replicas")
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=replicas)
    fully_shard(model, mesh=replicas)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()

    mesh, copies = None, given.ring * given.ulysses
    if copies * given.tensor > 1:
        dist.init_process_group("gloo")
        mesh = dist.init_device_mesh("cpu", (given.ring, given.ulysses, given.tensor),
                                     mesh_dim_names=("ring", "ulysses", "tensor"))
    torch.manual_seed(0)  # the same weights and batches on every rank
    model = Model(dim=64, head_dim=16, layers=2, mesh=mesh, seq_len=given.seq)
    if mesh is not None:
        parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.tensor(list(open(__file__, "rb").read()))
    positions = dattn.torch.position_ids(mesh, seq_len=given.seq)
    for step in range(given.steps):
        begin = torch.randint(len(text) - given.seq - 1, (2,))
        rows = torch.stack([text[at:at + given.seq + 1] for at in begin])
        ids, labels = (dattn.torch.shard(whole, mesh) for whole in (rows[:, :-1], rows[:, 1:]))
        logits = model(ids, positions)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (2 * given.seq)
        optimizer.zero_grad()
        (loss * copies).backward()
        optimizer.step()
        if mesh is not None:
            dist.all_reduce(loss)
            loss /= given.tensor  # ranks of one tensor group have the same rows
        if mesh is None or dist.get_rank() == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)
    if mesh is not None:
        dattn.torch.release_all()  # it holds the process groups, whose threads are to end before the interpreter
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
