"""The Megatron-Core example under torchrun: the losses of one process."""
import pytest

pytest.importorskip("megatron.core")
from test_examples import losses


def test_example():
    name = "megatron_layer_spec.py"
    one = losses(name, 1)
    many = losses(name, 4, "--tensor", "2", "--context", "2", "--comm-type", "a2a")
    assert len(one) == len(many) == 5 and one[-1] < one[0]
    for left, right in zip(one, many):
        assert abs(left - right) < 2e-5, (one, many)
