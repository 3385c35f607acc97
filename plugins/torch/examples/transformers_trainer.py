"""transformers.Trainer on sequences that no rank holds whole.

    torchrun --nproc-per-node 4 plugins/torch/examples/transformers_trainer.py --data 2 --ring 2

Two lines differ from a script without dattn: `register`, and the Trainer's class. Ranks of `data` have other samples; those of
`ring` and `ulysses` share a sample. The losses are those of one process with --batch as large as --data times that here."""
import argparse
import tempfile

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import dattn.transformers


class PrintLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']:.5f}", flush=True)
        if state.is_world_process_zero and "eval_loss" in logs:
            print(f"step eval loss {logs['eval_loss']:.5f}", flush=True)


def samples(seq, count):
    """Pieces of this file, the last third of each without labels."""
    text = torch.tensor(list(open(__file__, "rb").read()))
    pieces = [text[at:at + seq] for at in torch.linspace(0, len(text) - seq, count).long()]
    labels = [torch.where(torch.arange(seq) < seq - number * seq // (3 * count), piece, -100) for number, piece in enumerate(pieces)]
    return [{"input_ids": piece, "labels": label} for piece, label in zip(pieces, labels)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2, help="samples of one data rank")
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()

    mesh = None
    if given.data * given.ring * given.ulysses > 1:
        dist.init_process_group("gloo")
        mesh = dist.init_device_mesh("cpu", (given.data, given.ring, given.ulysses), mesh_dim_names=("data", "ring", "ulysses"))

    dattn.transformers.register(mesh=mesh)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)
    model = LlamaForCausalLM._from_config(config, attn_implementation="dattn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=given.batch, per_device_eval_batch_size=given.batch,
            gradient_accumulation_steps=2, max_steps=given.steps, learning_rate=3e-3, lr_scheduler_type="constant",
            logging_steps=1, eval_strategy="steps", eval_steps=given.steps, prediction_loss_only=True, save_strategy="no",
            report_to=[], disable_tqdm=True, seed=0)
        ShardedTrainer = dattn.transformers.ShardedTrainer.of(Trainer)
        trainer = ShardedTrainer(model=model, args=arguments, train_dataset=samples(given.seq, 16), mesh=mesh,
                                 eval_dataset=samples(given.seq, 4), callbacks=[PrintLoss()])
        trainer.train()
    if mesh is not None:
        dattn.torch.release_all()  # it holds the process groups, whose threads are to end before the interpreter
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
