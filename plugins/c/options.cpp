#include "plugins/c/options.h"

#include "core/base/error.h"
#include "parallel/call_config.h"
#include "plugins/c/tensor.h"

namespace dattn::c {
namespace {

// What attention_options() reads of a config.
struct CallOptions {
  AttentionConfig attention;
  std::optional<Layout> layout;
  std::string strategy = "auto";
  std::optional<Determinism> determinism;
};

AttentionConfig attention_of(const char* text) {
  return text == nullptr ? AttentionConfig{} : parse_config_as<AttentionConfig>(text, "attention");
}

std::optional<Determinism> determinism_named(const char* text) {
  if (text == nullptr) return std::nullopt;
  for (const auto& [name, value] : ConfigNames<Determinism>::kAll) {
    if (name == text) return value;
  }
  fail(ErrorCode::kBadInput, "determinism is '{}'; use off, repeatable or invariant", text);
}

}  // namespace

Layout layout_of(const char* text) { return text == nullptr ? kDefaultLayout : layout_from(text); }

AttentionOptions options_of(const char* attention, std::int64_t seq_q, std::int64_t seq_kv) {
  return attention_options(CallOptions{attention_of(attention), {}, "auto", {}}, seq_q, seq_kv);
}

AttentionShape shape_of(const dattn_attention_options& options) {
  AttentionShape shape{options.batch,
                       options.seq_q,
                       options.seq_kv != 0 ? options.seq_kv : options.seq_q,
                       options.heads,
                       options.kv_heads != 0 ? options.kv_heads : options.heads,
                       options.dim_qk,
                       options.dim_v != 0 ? options.dim_v : options.dim_qk,
                       to_dtype(options.dtype, "dattn_attention_options.dtype")};
  constexpr int kKnown = DATTN_BIAS | DATTN_BIAS_PER_BATCH | DATTN_BIAS_PER_HEAD;
  require((options.bias & ~kKnown) == 0, "dattn_attention_options.bias is {}; it is made of the flags {}, {} and {}",
          options.bias, static_cast<int>(DATTN_BIAS), static_cast<int>(DATTN_BIAS_PER_BATCH),
          static_cast<int>(DATTN_BIAS_PER_HEAD));
  if (options.bias != DATTN_BIAS_NONE)
    shape.bias = BiasShape{(options.bias & DATTN_BIAS_PER_BATCH) != 0, (options.bias & DATTN_BIAS_PER_HEAD) != 0};
  shape.sink = options.sink != 0;
  return shape;
}

AttentionOptions options_of(const dattn_attention_options& options, const AttentionShape& shape) {
  const CallOptions call{attention_of(options.attention), layout_of(options.layout),
                         options.strategy != nullptr ? options.strategy : "auto", determinism_named(options.determinism)};
  return attention_options(call, shape.seq_q, shape.seq_kv);
}

}  // namespace dattn::c
