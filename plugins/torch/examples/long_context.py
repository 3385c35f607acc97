"""Fine-tunes a small byte-level language model on long sequences that no rank holds whole.

    torchrun --nproc-per-node 4 plugins/torch/examples/long_context.py --ring 2 --ulysses 2

Every rank reads the same batch, cuts ids, positions and labels by one layout, and runs a model whose attention is
dattn.torch.attention; all else of the model works on rows alone. Gradients are summed over the ranks. The losses are those of
one process."""
import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dattn.torch


class Block(nn.Module):
    def __init__(self, dim, heads, mesh, seq_len):
        super().__init__()
        self.heads, self.mesh, self.seq_len = heads, mesh, seq_len
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):  # [batch, rows, dim]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = dattn.torch.attention(q, k, v, mask="causal", mesh=self.mesh, seq_len=self.seq_len)
        x = x + self.out(mixed.flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, dim, heads, layers, mesh, seq_len):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, dim), nn.Embedding(seq_len, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, mesh, seq_len) for _ in range(layers)))
        self.head = nn.Linear(dim, 256)

    def forward(self, ids, positions):
        return self.head(self.blocks(self.tokens(ids) + self.positions(positions)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()

    mesh = None
    if given.ring * given.ulysses > 1:
        dist.init_process_group("gloo")
        mesh = dist.init_device_mesh("cpu", (given.ring, given.ulysses), mesh_dim_names=("ring", "ulysses"))
    torch.manual_seed(0)  # the same weights and batches on every rank
    model = Model(dim=64, heads=4, layers=2, mesh=mesh, seq_len=given.seq)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.tensor(list(open(__file__, "rb").read()))
    positions = dattn.torch.position_ids(mesh, seq_len=given.seq)
    for step in range(given.steps):
        begin = torch.randint(len(text) - given.seq - 1, (2,))
        rows = torch.stack([text[at:at + given.seq + 1] for at in begin])
        # Labels are shifted before they are cut: a rank's next token may be on another rank.
        ids, labels = (dattn.torch.shard(whole, mesh) for whole in (rows[:, :-1], rows[:, 1:]))
        logits = model(ids, positions)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (2 * given.seq)
        optimizer.zero_grad()
        loss.backward()
        if mesh is not None:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            dist.all_reduce(loss)
        optimizer.step()
        if mesh is None or dist.get_rank() == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)
    if mesh is not None:
        dattn.torch.release_all()  # it holds the process groups, whose threads are to end before the interpreter
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
