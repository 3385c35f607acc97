// Cross-entropy over a slice of the vocabulary. Per row, with m the maximum over the whole vocabulary:
//   loss = log(sum of exp(l - m)) + m - l[target]        dl = (exp(l - m) / sum - [target]) * scale
// The maximum, the sum and the target's logit are reduced over the parts: 3 floats a row travel, never the logits.
// Source: Shoeybi et al., "Megatron-LM", 2019, section 3.
#pragma once

#include <cstdint>
#include <span>

#include "core/nn/hooks.h"
#include "core/tensor/tensor.h"

namespace dattn {

// logits [n, V] fp32, of the vocabulary from vocab_begin on; targets [n], -1 = no loss. Returns the sum of the losses
// times scale, equal on every part. With `gradient`, logits are replaced by the gradient of that sum.
double cross_entropy(const TensorView& logits, std::int64_t vocab_begin, std::span<const std::int32_t> targets, double scale,
                     VocabularyReduction& reduction, bool gradient);

}  // namespace dattn
