"""CoreAttention in Megatron-Core's GPTModel: losses and gradients of meshes of tensor, context and data parallel ranks are those
of one process."""
import pytest
import torch

from ranks import on_ranks, preload

pytest.importorskip("megatron.core")
preload("megatron_models")
import megatron_models as models

import dattn.megatron

ONE_PROCESS = {}


def wanted(core_attention, **options):
    key = (core_attention, str(options))
    if key not in ONE_PROCESS:
        ONE_PROCESS[key] = models.one_process(core_attention, **options)
    return ONE_PROCESS[key]


def compare(mesh, comm_types=(None,), want=models.Formula, seq=models.S, rows=models.B, **options):
    """Models on one mesh with each of the cp_comm_types, against one process whose core attention is `want`. Megatron cuts seq
    in twice as many parts as there are context ranks."""
    right = wanted(want, seq=seq, rows=rows, **options)
    models.initialize(**mesh)
    whole = models.batch(seq, rows)
    for word in comm_types:
        net = models.model(cp_comm_type=word, seq=seq, **options)
        models.compare(models.step(net, models.own_part(whole), whole["loss_mask"].sum()), right)


@on_ranks(1)
def test_one_process():
    compare({})
    compare({}, window_size=(6, 0))
    compare({}, softmax_scale=0.2)
    compare({}, apply_query_key_layer_scaling=True)


@on_ranks(2)
def test_two_ranks():
    compare({"tp": 2})
    compare({"cp": 2}, (None, "p2p", "a2a", "all_gather", "ring_q", "auto", "grid(rows=2)"))
    compare({"cp": 2}, ("p2p", "a2a", "halo"), window_size=(6, 0))
    compare({"cp": 2}, ("a2a",), num_query_groups=4)
    compare({})  # data parallel


@on_ranks(3)
def test_three_ranks():
    compare({"cp": 3}, ("p2p", "a2a"), seq=36)
    compare({}, rows=3)


@on_ranks(4)
def test_four_ranks():
    compare({"cp": 4, "hierarchical": [2, 2]}, ("a2a+p2p", "double_ring(ring_outer=2, ring=2)", "fetch",
                                                     "hybrid(ring=2, ulysses=2)", "tree"))
    compare({"tp": 2, "cp": 2}, ("p2p", "a2a"), num_query_groups=4)
    compare({"cp": 2}, ("all_gather",), window_size=(6, 0))


@on_ranks(5)
def test_five_ranks():
    compare({"cp": 5}, ("p2p", "all_gather"), seq=40)


@on_ranks(6)
def test_six_ranks():
    compare({"tp": 2, "cp": 3}, ("p2p", "a2a"), seq=36)
    compare({"tp": 2}, rows=3)
    compare({"cp": 3}, ("p2p",), seq=36)  # data parallel 2


@on_ranks(7)
def test_seven_ranks():
    compare({"cp": 7}, ("p2p", "a2a"), seq=42)


@on_ranks(8)
def test_eight_ranks():
    compare({"tp": 2, "cp": 2}, ("p2p",), window_size=(6, 0))
    compare({"tp": 2, "cp": 4}, ("all_gather", "grid(ring=2, rows=2)"))
