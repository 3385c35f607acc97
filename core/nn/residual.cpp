#include "core/nn/residual.h"

#include <cmath>
#include <vector>

#include "core/base/philox.h"
#include "core/nn/linear.h"
#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kRows = 32;  // rows of one block

// SplitMix64's finaliser (Steele, Lea and Flood, 2014).
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

std::uint64_t key_of(const Dropout& dropout) {
  constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15u;
  return mix(mix(mix(dropout.seed + kGolden) + dropout.step + kGolden) + dropout.site + kGolden);
}

// scales [4 Q]: 0 or `kept`. Feature e is word e / Q of block e mod Q, so that the four words are stored side by side.
DATTN_VECTORIZED void fill_scales(std::uint64_t key, std::uint32_t row, std::uint64_t position, std::uint32_t threshold,
                                  float kept, std::int64_t quarter, float* __restrict scales) {
  for (std::int64_t i = 0; i < quarter; ++i) {
    std::uint32_t c0 = static_cast<std::uint32_t>(i), c1 = static_cast<std::uint32_t>(position);
    std::uint32_t c2 = static_cast<std::uint32_t>(position >> 32), c3 = row;
    std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {  // philox4x32 of core/base/philox.h, in a form that is vectorised
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0, p1 = std::uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<std::uint32_t>(p1);
      c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<std::uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    scales[i] = (c0 >> 8) >= threshold ? kept : 0.0f;
    scales[i + quarter] = (c1 >> 8) >= threshold ? kept : 0.0f;
    scales[i + 2 * quarter] = (c2 >> 8) >= threshold ? kept : 0.0f;
    scales[i + 3 * quarter] = (c3 >> 8) >= threshold ? kept : 0.0f;
  }
}

DATTN_VECTORIZED void add_rows(const float* x, const float* bias, const float* scales, float* branch, std::int64_t dim) {
  if (scales != nullptr) {
    for (std::int64_t j = 0; j < dim; ++j) branch[j] = x[j] + (branch[j] + (bias != nullptr ? bias[j] : 0.0f)) * scales[j];
  } else {
    for (std::int64_t j = 0; j < dim; ++j) branch[j] = x[j] + branch[j] + (bias != nullptr ? bias[j] : 0.0f);
  }
}

DATTN_VECTORIZED void scale_row(const float* scales, float* x, std::int64_t dim) {
  for (std::int64_t j = 0; j < dim; ++j) x[j] *= scales[j];
}

std::uint32_t threshold_of(const Dropout& dropout) { return static_cast<std::uint32_t>(std::llround(dropout.p * 0x1p24)); }
float kept_of(const Dropout& dropout) { return static_cast<float>(1.0 / (1.0 - dropout.p)); }

CudaDropout cuda_dropout(const Dropout& dropout, const TokenRows& rows) {
  return {threshold_of(dropout),
          kept_of(dropout),
          key_of(dropout),
          rows.begin,
          rows.batch_begin,
          rows.on_device,
          static_cast<std::int64_t>(rows.positions.size())};
}

// Calls body(row, scales) for every row; scales is null where nothing is dropped.
template <class Body>
void for_rows(const Dropout& dropout, const TokenRows& rows, std::int64_t dim, const Body& body) {
  const std::uint64_t key = key_of(dropout);
  const std::int64_t quarter = (dim + 3) / 4;
  const std::uint32_t threshold = threshold_of(dropout);
  const float kept = kept_of(dropout);
  parallel_blocks(rows.count, kRows, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scales(dropout.p > 0.0 ? static_cast<std::size_t>(4 * quarter) : 0);
    for (std::int64_t row = begin; row < end; ++row) {
      if (!scales.empty()) {
        fill_scales(key, static_cast<std::uint32_t>(rows.batch_row(row)), static_cast<std::uint64_t>(rows.position(row)),
                    threshold, kept, quarter, scales.data());
      }
      body(row, scales.empty() ? nullptr : scales.data());
    }
  });
}

}  // namespace

void dropout_apply(const Dropout& dropout, const TokenRows& rows, const TensorView& x) {
  if (dropout.p == 0.0) return;
  if (on_cuda({&x})) return cuda_nn().dropout(cuda_dropout(dropout, rows), x, cuda_stream());
  const std::int64_t dim = x.size(1);
  for_rows(dropout, rows, dim,
           [&](std::int64_t row, const float* scales) { scale_row(scales, x.ptr<float>() + row * dim, dim); });
}

Tensor residual_forward(const Dropout& dropout, const TokenRows& rows, const TensorView& x, Tensor branch,
                        const Parameter* bias) {
  const std::int64_t dim = x.size(1);
  const float* b = bias != nullptr ? bias->value.ptr<float>() : nullptr;
  if (on_cuda({&x, &branch.view()})) {
    cuda_nn().residual(cuda_dropout(dropout, rows), x, b, branch, cuda_stream());
    return branch;
  }
  for_rows(dropout, rows, dim, [&](std::int64_t row, const float* scales) {
    add_rows(x.ptr<float>() + row * dim, b, scales, branch.ptr<float>() + row * dim, dim);
  });
  return branch;
}

Tensor residual_backward(const Dropout& dropout, const TokenRows& rows, const TensorView& dy, Parameter* bias) {
  Tensor branch = to_dtype(dy, DType::kF32);
  dropout_apply(dropout, rows, branch);
  if (bias != nullptr) add_column_sums(branch, bias->gradient, rows.tree);
  return branch;
}

}  // namespace dattn
