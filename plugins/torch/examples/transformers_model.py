"""Trains a Transformers model on sequences that no rank holds whole, then lets it write.

    torchrun --nproc-per-node 4 plugins/torch/examples/transformers_model.py --ring 2 --ulysses 2

The model is the library's own; `attn_implementation="dattn"` is all that it is told. Here it is small, random and reads bytes;
AutoModelForCausalLM.from_pretrained(name, attn_implementation="dattn") goes the same way. The losses are those of one
process."""
import argparse

import torch
import torch.distributed as dist
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import dattn.transformers


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()

    mesh = None
    if given.ring * given.ulysses > 1:
        dist.init_process_group("gloo")
        mesh = dist.init_device_mesh("cpu", (given.ring, given.ulysses), mesh_dim_names=("ring", "ulysses"))
    first = mesh is None or dist.get_rank() == 0

    dattn.transformers.register(mesh=mesh)
    torch.manual_seed(0)  # the same weights and batches on every rank
    config = Gemma3TextConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, head_dim=16, sliding_window=64, bos_token_id=2, eos_token_id=1,
                              layer_types=["sliding_attention", "full_attention"])
    model = Gemma3ForCausalLM._from_config(config, attn_implementation="dattn")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(open(__file__, "rb").read()))
    for step in range(given.steps):
        ids = torch.stack([text[at:at + given.seq] for at in torch.randint(len(text) - given.seq, (2,))])
        batch = {"input_ids": ids, "labels": ids}
        # This rank's rows; labels are shifted before they are cut. The loss is this rank's part.
        loss = model(**dattn.transformers.shard_batch(batch, mesh), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        if mesh is not None:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            dist.all_reduce(loss)
        optimizer.step()
        if first:
            print(f"step {step} loss {loss.item():.5f}", flush=True)

    # To generate, every rank runs the whole model, and attention over the prompt is shared out.
    dattn.transformers.register(mesh=mesh, name="dattn_generate", activations="replicated")
    model.set_attn_implementation("dattn_generate")
    written = model.eval().generate(text[None, :100], max_new_tokens=20, do_sample=False)
    if first:
        print("wrote", bytes(written[0, 100:].tolist()))
    if mesh is not None:
        dattn.torch.release_all()  # it holds the process groups, whose threads are to end before the interpreter
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
