"""Small random models of the families that the Transformers tests use, and batches for them."""
import torch
import transformers
from transformers import (BertConfig, Gemma2Config, Gemma3TextConfig, GPT2Config, GptOssConfig, LlamaConfig, MistralConfig,
                          Qwen3Config, ViTConfig, WhisperConfig)

S = 37
VOCAB = 61
_BASE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
             tie_word_embeddings=False)
_LAYERS = ["sliding_attention", "full_attention"]

# name -> (class, configuration, what it is compared with)
FAMILIES = {
    "llama": ("LlamaForCausalLM", lambda: LlamaConfig(**_BASE), "sdpa"),
    "qwen3": ("Qwen3ForCausalLM", lambda: Qwen3Config(**_BASE), "sdpa"),
    "mistral": ("MistralForCausalLM", lambda: MistralConfig(**_BASE, sliding_window=9), "sdpa"),
    "gemma2": ("Gemma2ForCausalLM", lambda: Gemma2Config(
        **_BASE, sliding_window=9, layer_types=_LAYERS, attn_logit_softcapping=2.0, query_pre_attn_scalar=8), "eager"),
    "gemma3": ("Gemma3ForCausalLM", lambda: Gemma3TextConfig(
        **_BASE, sliding_window=9, layer_types=_LAYERS, query_pre_attn_scalar=8), "sdpa"),
    "gpt_oss": ("GptOssForCausalLM", lambda: GptOssConfig(
        **_BASE, sliding_window=9, layer_types=_LAYERS, num_local_experts=2, num_experts_per_tok=1), "eager"),
    "gpt2": ("GPT2LMHeadModel", lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0), "sdpa"),
}


def encoder(kind):
    """BERT, with a head."""
    config = BertConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3)
    return random_weights(getattr(transformers, kind)._from_config(config, attn_implementation="sdpa"))


def vision():
    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4,
                       hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=5)
    return random_weights(transformers.ViTForImageClassification._from_config(config, attn_implementation="sdpa"))


def speech():
    config = WhisperConfig(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                           decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
                           max_source_positions=29, max_target_positions=40, dropout=0, attention_dropout=0, activation_dropout=0,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
                           begin_suppress_tokens=None)
    return random_weights(transformers.WhisperForConditionalGeneration._from_config(config, attn_implementation="sdpa"))


def causal(name, implementation=None):
    kind, config, reference = FAMILIES[name]
    return random_weights(getattr(transformers, kind)._from_config(config(), attn_implementation=implementation or reference))


def random_weights(model):
    """Large enough that attention is not uniform."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model


def batch(padding="right", rows=2, seq=S):
    """input_ids, labels and attention_mask; the second row has 8 positions of padding."""
    torch.manual_seed(6)
    ids = torch.randint(3, VOCAB, (rows, seq))
    made = {"input_ids": ids, "labels": ids.clone()}
    made["labels"][0, 3:6] = -100
    if padding is not None:
        mask = torch.ones_like(ids)
        hidden = slice(0, 8) if padding == "left" else slice(seq - 8, seq)
        mask[1, hidden] = 0
        made["attention_mask"] = mask
        made["labels"][1, hidden] = -100
        made["labels"][1, 8] = -100  # would be predicted from padding
    return made


def gradients(model):
    """All gradients as one vector."""
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])
