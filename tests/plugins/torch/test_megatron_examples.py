"""The Megatron-Core example under torchrun: the losses of one process; and README.md's lines."""
import pytest

from ranks import on_ranks, preload

pytest.importorskip("megatron.core")
preload("megatron_models")
import megatron_models as models
from readme import snippet
from test_examples import losses


def test_example():
    name = "megatron_layer_spec.py"
    one = losses(name, 1)
    many = losses(name, 4, "--tensor", "2", "--context", "2", "--comm-type", "a2a")
    assert len(one) == len(many) == 5 and one[-1] < one[0]
    for left, right in zip(one, many):
        assert abs(left - right) < 2e-5, (one, many)


@on_ranks(2)
def test_readme():
    want, whole = models.one_process(models.Formula), models.batch()
    models.initialize(cp=2)
    names = {}
    exec(snippet("dattn.megatron"), names)
    net = models.model(spec=names["spec"])
    models.compare(models.step(net, models.own_part(whole), whole["loss_mask"].sum()), want)
