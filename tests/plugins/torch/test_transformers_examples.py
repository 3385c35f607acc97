"""The Transformers examples under torchrun: Trainer and a plain loop have the losses of one process; and README.md's lines."""
import pytest
import torch.distributed as dist

from ranks import on_ranks, preload

pytest.importorskip("transformers")
preload("transformers_models", "dattn.transformers")
import transformers_models as models
from readme import snippet
from reference import close
from test_examples import losses


@pytest.mark.parametrize("name, ranks, arguments, alone", [
    ("transformers_trainer.py", 4, ["--ring", "2", "--ulysses", "2"], []),
    ("transformers_trainer.py", 4, ["--data", "2", "--ring", "2"], ["--batch", "4"]),
    ("transformers_model.py", 2, ["--ring", "2"], [])])
def test_example(name, ranks, arguments, alone):
    one, many = losses(name, 1, *alone), losses(name, ranks, *arguments)
    assert len(one) == len(many) == 5 and one[-1] < one[0]
    for left, right in zip(one, many):
        assert abs(left - right) < 2e-5, (one, many)


@on_ranks(4)
def test_readme(tmp_path):
    batch, model = models.batch(), models.causal("llama")
    model.save_pretrained(tmp_path)  # by rank 0 alone
    dist.barrier()
    names = {"name": tmp_path, "batch": batch}
    exec(snippet("dattn.transformers"), names)
    loss = names["loss"].detach()
    dist.all_reduce(loss)
    close(loss, model(**batch).loss, 1e-5)
