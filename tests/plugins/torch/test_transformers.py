"""attn_implementation="dattn": losses and gradients of small random models are those of sdpa or eager, on 1, 2 and 4 ranks."""
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ranks import mesh, on_ranks, preload
from reference import close

pytest.importorskip("transformers")
preload("transformers_models", "dattn.transformers")
import dattn.transformers
import transformers_models as models
from dattn import BadInput
from dattn.torch import _masks
from dattn.transformers import _attention

S = models.S


def train(model, batch):
    """(loss, gradients) of a step."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), models.gradients(model)


def compare(name, where, padding, layout="zigzag"):
    model = models.causal(name)
    batch = models.batch(padding)
    want, want_gradients = train(model, batch)
    dattn.transformers.register(where, layout=layout)
    model.set_attn_implementation("dattn")
    loss, own = train(model, dattn.transformers.shard_batch(batch, where, layout))
    if where is not None:
        dist.all_reduce(loss)
        dist.all_reduce(own)
    close(loss, want, 1e-5)
    close(own, want_gradients, 2e-5)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_one_rank(name):
    for padding in (None, "right", "left"):
        compare(name, None, padding)


@pytest.mark.parametrize("name", models.FAMILIES)
@on_ranks(2)
def test_two_ranks(name):
    compare(name, mesh(ring=2), "right")
    compare(name, mesh(ulysses=2), "left", "striped")


@pytest.mark.parametrize("name", models.FAMILIES)
@on_ranks(4)
def test_four_ranks(name):
    compare(name, mesh(ring=2, ulysses=2), None)
    compare(name, mesh(ring=4), "left")


@on_ranks(4)
def test_data_ranks_have_other_samples():
    where = mesh(data=2, ring=2)
    model, batch = models.causal("llama"), models.batch()
    want, want_gradients = train(model, batch)
    dattn.transformers.register(where)
    model.set_attn_implementation("dattn")
    row = where.get_local_rank("data")
    loss, own = train(model, dattn.transformers.shard_batch({k: v[row:row + 1] for k, v in batch.items()}, where))
    dist.all_reduce(loss)
    dist.all_reduce(own)
    close(loss, want, 1e-5)
    close(own, want_gradients, 2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@on_ranks(2)
def test_models_in_half_precision(dtype, tolerance):
    model, batch = models.causal("llama"), models.batch("left")
    want, want_gradients = train(model, batch)
    where = mesh(ring=2)
    dattn.transformers.register(where)
    model.set_attn_implementation("dattn")
    loss, own = train(model.to(dtype), dattn.transformers.shard_batch(batch, where))
    assert own.dtype == dtype
    loss, own = loss.float(), own.float()
    dist.all_reduce(loss)
    dist.all_reduce(own)
    close(loss, want, tolerance)
    close(own, want_gradients, tolerance)


@on_ranks(2)
def test_packed_documents():
    ids, positions = models.batch(None, rows=1)["input_ids"], torch.cat([torch.arange(n) for n in (14, 3, 20)])[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    for name in ("llama", "mistral"):
        model = models.causal(name)
        model.config.use_cache = False  # transformers looks for documents where there is no cache
        want, want_gradients = train(model, batch)
        model.set_attn_implementation("eager")
        close(train(model, batch)[0], want, 1e-5)
        for activations in ("replicated", "sharded"):
            dattn.transformers.register(mesh(ring=2), activations=activations)
            model.set_attn_implementation("dattn")
            if activations == "replicated":
                loss, own = train(model, batch)
            else:
                loss, own = train(model, dattn.transformers.shard_batch(batch, mesh(ring=2)))
                dist.all_reduce(loss)
                dist.all_reduce(own)
            close(loss, want, 1e-5)
            close(own, want_gradients, 2e-5)


@on_ranks(2)
def test_checkpointed_activations():
    model, batch = models.causal("gemma3"), models.batch()
    want, want_gradients = train(model, batch)
    dattn.transformers.register(mesh(ring=2))
    model.set_attn_implementation("dattn")
    model.gradient_checkpointing_enable()
    model.train()
    loss, own = train(model, dattn.transformers.shard_batch(batch, mesh(ring=2)))
    dist.all_reduce(own)
    close(own, want_gradients, 2e-5)


def token_loss(model, batch):
    """BERT's own loss is a mean over the tokens it is given."""
    model.zero_grad()
    logits = model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids", "token_type_ids")}).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), models.gradients(model)


def compare_encoder(where):
    model, batch = models.encoder("BertForMaskedLM"), models.batch()
    batch["token_type_ids"] = torch.arange(S).expand(2, S) // 20
    want, want_gradients = token_loss(model, batch)
    dattn.transformers.register(where)
    model.set_attn_implementation("dattn")
    part = dattn.transformers.shard_batch(batch, where, shift_labels=False)
    assert part["num_items_in_batch"] == (batch["labels"] != -100).sum()
    loss, own = token_loss(model, part)
    if where is not None:
        dist.all_reduce(loss)
        dist.all_reduce(own)
    close(loss, want, 1e-5)
    close(own, want_gradients, 2e-5)


def test_bert_on_one_rank():
    compare_encoder(None)


@on_ranks(2)
def test_bert_on_two_ranks():
    compare_encoder(mesh(ring=2))
    compare_encoder(mesh(ulysses=2))


@on_ranks(4)
def test_bert_on_four_ranks():
    compare_encoder(mesh(ring=2, ulysses=2))


def replicated_models():
    """(model, batch) of models that mix positions outside attention too: pooling, convolutions, cross-attention."""
    torch.manual_seed(2)
    labels = torch.randint(3, models.VOCAB, (2, 21))
    labels[1, 15:] = -100
    return {
        "vit": (models.vision(), {"pixel_values": torch.randn(2, 3, 24, 24), "labels": torch.tensor([1, 4])}),
        "bert": (models.encoder("BertForSequenceClassification"),
                 {**models.batch("right"), "labels": torch.tensor([0, 2])}),
        "whisper": (models.speech(), {"input_features": torch.randn(2, 8, 58), "labels": labels}),
        "gpt_oss": (models.causal("gpt_oss"), models.batch("left")),
        "gemma2": (models.causal("gemma2"), models.batch("right")),
    }


def compare_replicated(where, layout="zigzag"):
    """Every rank has the loss and all of the gradients."""
    for model, batch in replicated_models().values():
        want, want_gradients = train(model, batch)
        dattn.transformers.register(where, activations="replicated", layout=layout)
        model.set_attn_implementation("dattn")
        loss, own = train(model, batch)
        close(loss, want, 1e-5)
        close(own, want_gradients, 2e-5)


def test_replicated_activations_on_one_rank():
    compare_replicated(None)


@on_ranks(2)
def test_replicated_activations_on_two_ranks():
    compare_replicated(mesh(ring=2))


@on_ranks(4)
def test_replicated_activations_on_four_ranks():
    compare_replicated(mesh(ring=2, ulysses=2), "contiguous")


@on_ranks(2)
def test_dropout():
    """Dropout is keyed by positions: ranks drop what one rank drops, whatever the mesh."""
    config = models.FAMILIES["llama"][1]()
    config.attention_dropout = 0.3
    torch.manual_seed(1)
    model = models.random_weights(models.transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")).train()
    results = []
    for where, activations in ((None, "sharded"), (mesh(ring=2), "sharded"), (mesh(ring=2), "replicated")):
        dattn.transformers.register(where, activations=activations)
        model.set_attn_implementation("dattn")
        batch = models.batch()
        if activations == "sharded":
            batch = dattn.transformers.shard_batch(batch, where)
        torch.manual_seed(9)
        loss, own = train(model, batch)
        if where is not None and activations == "sharded":
            dist.all_reduce(loss)
            dist.all_reduce(own)
        results.append((loss, own))
    for loss, own in results[1:]:
        close(loss, results[0][0], 1e-5)
        close(own, results[0][1], 2e-5)


@on_ranks(2)
def test_shard_batch():
    where, batch = mesh(ring=2), models.batch("right")
    part = dattn.transformers.shard_batch(batch, where)
    rows = dattn.torch.position_ids(where, seq_len=S)
    assert torch.equal(part["input_ids"], batch["input_ids"][:, rows]) and torch.equal(part["position_ids"], rows[None])
    assert torch.equal(part["attention_mask"], batch["attention_mask"])  # of the whole sequence
    following = torch.cat([batch["labels"], torch.full((2, 1), -100)], 1)[:, rows + 1]
    assert torch.equal(part["labels"], following) and torch.equal(part["shift_labels"], following)
    assert part["num_items_in_batch"] == (batch["labels"][:, 1:] != -100).sum()
    assert "cu_seq_lens_q" not in part and batch["labels"].shape == (2, S)  # the batch given is left as it was
    with pytest.raises(BadInput, match="needs input_ids or inputs_embeds"):
        dattn.transformers.shard_batch({"labels": following}, where)
    with pytest.raises(BadInput, match="2 positions for 2 ranks .* give at least 4"):
        dattn.transformers.shard_batch({"input_ids": torch.ones(1, 2, dtype=torch.int64)}, where)
    with pytest.raises(BadInput, match=r"attention_mask has shape \[2, 36\]; give \[2, 37\]"):
        dattn.transformers.shard_batch({**batch, "attention_mask": batch["attention_mask"][:, 1:]}, where)
    with pytest.raises(BadInput, match="begin anew inside a batch of 2 rows"):
        dattn.transformers.shard_batch({"input_ids": batch["input_ids"], "position_ids": torch.arange(S).remainder(9)[None]}, where)


@on_ranks(2)
def test_refusals():
    where, batch = mesh(ring=2), models.batch()
    dattn.transformers.register(where)
    model = models.causal("llama", "dattn")
    with pytest.raises(BadInput, match="no attention_mask; .*shard_batch"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(BadInput, match="attention_mask of this rank's 37 positions"):
        model(**batch)
    with pytest.raises(BadInput, match="use register\\(activations='replicated'\\)"):
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    with pytest.raises(BadInput, match="activations is 'whole'; known: sharded, replicated"):
        dattn.transformers.register(where, activations="whole")
    with pytest.raises(BadInput, match="mesh is a str"):
        dattn.transformers.register("ring")


def prefix_or_causal(batch, head, q, k):
    """A mask function that dattn does not know."""
    return (k <= q) | (k < 5)


@on_ranks(2)
def test_what_needs_the_whole_sequence_is_refused_on_shards():
    where, batch = mesh(ring=2), models.batch()
    dattn.transformers.register(where)
    model, part = models.causal("llama", "dattn"), dattn.transformers.shard_batch(batch, where)
    with pytest.raises(BadInput, match="weights are never formed"):
        model(**part, output_attentions=True)
    settings, q = _attention.Settings(where), torch.randn(2, 4, 8, 8)
    with pytest.raises(BadInput, match="prefix_or_causal is unknown, and cannot be called where activations are sharded"):
        _attention.make_mask(settings, batch_size=2, q_length=S // 2, kv_length=S // 2, mask_function=prefix_or_causal,
                             attention_mask=batch["attention_mask"].bool())
    with pytest.raises(BadInput, match="added to scores depends on the whole sequence"):
        _attention.attend(settings, None, q, q, q, None, position_bias=torch.zeros(1, 4, 8, 8))


@on_ranks(2)
def test_trainers_that_would_have_another_loss_are_refused():
    class Trainer:
        """What ShardedTrainer sees of transformers' own."""

        def __init__(self, ranks=2, counts_labels=True, divides_by_all=True):
            self.model, self.model_accepts_loss_kwargs = self, counts_labels
            self.args = SimpleNamespace(world_size=ranks, average_tokens_across_devices=divides_by_all)

    where = mesh(ring=2)
    made = lambda **options: dattn.transformers.ShardedTrainer.of(Trainer)(mesh=where, **options)
    with pytest.raises(BadInput, match="1 data x 2 sequence ranks, but Trainer runs on 4"):
        made(ranks=4)
    with pytest.raises(BadInput, match="takes no num_items_in_batch"):
        made(counts_labels=False)
    with pytest.raises(BadInput, match="average_tokens_across_devices is off"):
        made(divides_by_all=False)
    with pytest.raises(BadInput, match="predictions of sharded sequences are not gathered"):
        made().prediction_step(None, {}, prediction_loss_only=False)


def test_mask_functions_that_are_not_known_are_written_out():
    mask = _attention.make_mask(_attention.Settings(), batch_size=1, q_length=S, kv_length=S, mask_function=prefix_or_causal)
    q, k = torch.arange(S)[:, None], torch.arange(S)
    assert torch.equal(_masks.visible(mask.kind, S, S, 1)[0], prefix_or_causal(0, 0, q, k))


def test_position_bias_is_added_to_scores():
    q, k, v = (torch.randn(2, 4, S, 8) for _ in range(3))
    bias = torch.randn(1, 4, S, S)
    got, weights = _attention.attend(_attention.Settings(), SimpleNamespace(is_causal=False), q, k, v, None, position_bias=bias)
    close(got.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(q, k, v, bias))
    assert weights is None


def test_a_users_own_mask():
    """A 4-d mask comes to attention as it is: bands are recognised, other masks refused."""
    model, batch = models.causal("llama"), models.batch(None)
    seen = torch.ones(S, S, dtype=torch.bool).tril() & ~torch.ones(S, S, dtype=torch.bool).tril(-12)
    batch["attention_mask"] = seen.expand(2, 1, S, S)
    want, want_gradients = train(model, batch)
    dattn.transformers.register()
    model.set_attn_implementation("dattn")
    loss, own = train(model, batch)
    close(loss, want, 1e-5)
    close(own, want_gradients, 2e-5)
