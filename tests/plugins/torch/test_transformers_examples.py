"""The Transformers examples under torchrun: Trainer and a plain loop have the loss curve of one process."""
import pytest

pytest.importorskip("transformers")
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
