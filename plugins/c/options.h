// The texts and numbers of an attention's options as the engine's.
#pragma once

#include "parallel/attention.h"
#include "plugins/c/dattn.h"

namespace dattn::c {

Layout layout_of(const char* text);  // NULL: zigzag

// The `attention` section of a config as options; NULL: causal. Texts as in dattn_attention_options.
AttentionOptions options_of(const char* attention, std::int64_t seq_q, std::int64_t seq_kv);

AttentionShape shape_of(const dattn_attention_options& options);
AttentionOptions options_of(const dattn_attention_options& options, const AttentionShape& shape);

}  // namespace dattn::c
