// The reference kernel: the definition of attention as plain loops in double, whatever the storage type. Everything
// else is compared with it; speed does not matter here.
// Source: Vaswani et al., "Attention is all you need", 2017; the gradients as in Dao et al., "FlashAttention", 2022.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/attention/check_args.h"
#include "core/attention/dropout.h"
#include "core/attention/kernel.h"
#include "core/base/threads.h"

namespace dattn {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

double load(const TensorView& view, std::int64_t offset) {
  switch (view.dtype) {
    case DType::kF64: return view.ptr<double>()[offset];
    case DType::kBF16: return static_cast<double>(view.ptr<BFloat16>()[offset]);
    case DType::kF16: return static_cast<double>(view.ptr<Float16>()[offset]);
    default: return static_cast<double>(view.ptr<float>()[offset]);
  }
}

void store(const TensorView& view, std::int64_t offset, double value) {
  if (view.dtype == DType::kF64)
    view.ptr<double>()[offset] = value;
  else
    view.ptr<float>()[offset] = static_cast<float>(value);
}

std::int64_t offset_of(const TensorView& view, std::int64_t a, std::int64_t b, std::int64_t c) {
  return a * view.stride(0) + b * view.stride(1) + c * view.stride(2);
}

// Where column 0 of a bias row is; axes of size 1 are shared.
std::int64_t bias_at(const TensorView& bias, std::int64_t b, std::int64_t s, std::int64_t h) {
  return offset_of(bias, bias.size(0) == 1 ? 0 : b, s, bias.size(2) == 1 ? 0 : h);
}

// One row of [B, S, H, D] as doubles.
std::vector<double> load_row(const TensorView& view, std::int64_t b, std::int64_t s, std::int64_t h) {
  std::vector<double> row(static_cast<std::size_t>(view.size(3)));
  const std::int64_t base = offset_of(view, b, s, h);
  for (std::size_t d = 0; d < row.size(); ++d) row[d] = load(view, base + static_cast<std::int64_t>(d));
  return row;
}

// All rows of one head.
std::vector<std::vector<double>> load_rows(const TensorView& view, std::int64_t b, std::int64_t h) {
  std::vector<std::vector<double>> rows;
  for (std::int64_t s = 0; s < view.size(1); ++s) rows.push_back(load_row(view, b, s, h));
  return rows;
}

void add_row(const TensorView& view, std::int64_t b, std::int64_t s, std::int64_t h, const std::vector<double>& row) {
  const std::int64_t base = offset_of(view, b, s, h);
  for (std::size_t d = 0; d < row.size(); ++d) {
    const std::int64_t at = base + static_cast<std::int64_t>(d);
    store(view, at, load(view, at) + row[d]);
  }
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// to += factor * from
void axpy(double factor, const std::vector<double>& from, std::vector<double>& to) {
  for (std::size_t i = 0; i < from.size(); ++i) to[i] += factor * from[i];
}

// A key row that a query row sees, and the positions of both.
struct Seen {
  std::int64_t key, k_position, q_position;
};

// The key rows that each query row sees, ascending where `ascending`.
std::vector<std::vector<Seen>> visible_keys(std::span<const Tile> tiles, std::int64_t seq_q, bool ascending) {
  std::vector<std::vector<Seen>> keys(static_cast<std::size_t>(seq_q));
  for (const Tile& tile : tiles) {
    for (std::int64_t q = tile.rows.q.begin; q < tile.rows.q.end; ++q) {
      const auto [begin, end] = keys_of(tile, q);
      for (std::int64_t k = begin; k < end; ++k) keys[static_cast<std::size_t>(q)].push_back({k, tile.k_at(k), tile.q_at(q)});
    }
  }
  for (auto& row : keys) {
    if (ascending) std::sort(row.begin(), row.end(), [](const Seen& a, const Seen& b) { return a.key < b.key; });
  }
  return keys;
}

// A score, and its derivative by scale * q k^T.
struct Score {
  double value, slope;
};

Score score_of(const ScoreTerms& terms, double product, std::int64_t b, std::int64_t s, std::int64_t local_head,
               const HeadMap& heads, const Seen& seen) {
  Score score{product, 1};
  if (terms.softcap != 0) {
    const double t = std::tanh(product / terms.softcap);
    score = {terms.softcap * t, 1 - t * t};
  }
  if (!terms.alibi_slopes.empty()) {
    score.value += terms.alibi_slopes[static_cast<std::size_t>(heads.q_begin + local_head)] *
                   static_cast<double>(seen.k_position - seen.q_position);
  }
  if (terms.bias.data != nullptr) score.value += load(terms.bias, bias_at(terms.bias, b, s, local_head) + seen.k_position);
  return score;
}

// What dropout multiplies a probability with: 0 or 1 / (1 - p).
double kept(const AttentionDropout& dropout, std::int64_t b, std::int64_t head, const Seen& seen) {
  if (dropout.p == 0) return 1;
  return keeps(dropout, b, head, seen.q_position, seen.k_position) ? 1 / (1 - dropout.p) : 0;
}

// Folds one row's result into (out, lse) at (b, s, h), or overwrites it.
void finish_row(const AttendArgs& args, std::int64_t b, std::int64_t s, std::int64_t h, const std::vector<double>& value,
                double lse) {
  const std::int64_t lse_at = offset_of(args.lse, b, h, s);
  const double old_lse = args.merge ? load(args.lse, lse_at) : kNothing;
  const double top = std::max(old_lse, lse);
  const double keep = old_lse == kNothing ? 0 : std::exp(old_lse - top);
  const double take = lse == kNothing ? 0 : std::exp(lse - top);
  const double sum = keep + take;
  store(args.lse, lse_at, top == kNothing ? kNothing : top + std::log(sum));
  const std::int64_t base = offset_of(args.out, b, s, h);
  for (std::size_t d = 0; d < value.size(); ++d) {
    const std::int64_t at = base + static_cast<std::int64_t>(d);
    const double old = keep > 0 ? keep * load(args.out, at) : 0.0;
    store(args.out, at, sum > 0 ? (old + take * value[d]) / sum : sum);
  }
}

void attend_head(const AttendArgs& args, const std::vector<std::vector<Seen>>& keys, std::int64_t b, std::int64_t h) {
  const std::int64_t kv = args.heads.kv_of(h);
  const std::vector<std::vector<double>> k = load_rows(args.k, b, kv), v = load_rows(args.v, b, kv);
  for (std::int64_t s = 0; s < args.q.size(1); ++s) {
    const auto& seen = keys[static_cast<std::size_t>(s)];
    const std::vector<double> q = load_row(args.q, b, s, h);
    std::vector<double> scores;
    double top = kNothing;
    for (const Seen& t : seen) {
      const double product = args.scale * dot(q, k[static_cast<std::size_t>(t.key)]);
      scores.push_back(score_of(args.terms, product, b, s, h, args.heads, t).value);
      top = std::isnan(scores.back()) ? scores.back() : std::max(top, scores.back());
    }
    std::vector<double> value(static_cast<std::size_t>(args.v.size(3)));
    double sum = 0;
    for (std::size_t i = 0; i < seen.size() && top != kNothing; ++i) {
      const double p = std::exp(scores[i] - top);
      sum += p;
      const double weight = p * kept(args.terms.dropout, b, args.heads.q_begin + h, seen[i]);
      axpy(weight, v[static_cast<std::size_t>(seen[i].key)], value);
    }
    for (double& x : value) x = sum == 0 ? 0 : x / sum;
    finish_row(args, b, s, h, value, sum == 0 ? kNothing : top + std::log(sum));
  }
}

// Gradients of the keys and values of one KV head, one row a key; in double until they are added to dk and dv.
struct KeyGradients {
  std::vector<std::vector<double>> dk, dv;

  explicit KeyGradients(const AttendGradArgs& args)
      : dk(static_cast<std::size_t>(args.k.size(1)), std::vector<double>(static_cast<std::size_t>(args.k.size(3)))),
        dv(static_cast<std::size_t>(args.k.size(1)), std::vector<double>(static_cast<std::size_t>(args.v.size(3)))) {}
  void add_to(const AttendGradArgs& args, std::int64_t b, std::int64_t kv) const {
    for (std::size_t t = 0; t < dk.size() && args.dk.data != nullptr; ++t) {
      add_row(args.dk, b, static_cast<std::int64_t>(t), kv, dk[t]);
      add_row(args.dv, b, static_cast<std::int64_t>(t), kv, dv[t]);
    }
  }
};

// The keys and values of one KV head, one row a key.
struct KeyRows {
  std::vector<std::vector<double>> k, v;
};

void grad_row(const AttendGradArgs& args, const KeyRows& keys, const std::vector<Seen>& seen, std::int64_t b, std::int64_t s,
              std::int64_t h, KeyGradients& sums) {
  const double lse = load(args.lse, offset_of(args.lse, b, h, s));
  if (lse == kNothing) return;
  const double delta = load(args.delta, offset_of(args.delta, b, h, s));
  const std::vector<double> q = load_row(args.q, b, s, h), dout = load_row(args.dout, b, s, h);
  std::vector<double> dq(q.size());
  for (const Seen& t : seen) {
    const auto key = static_cast<std::size_t>(t.key);
    const Score score = score_of(args.terms, args.scale * dot(q, keys.k[key]), b, s, h, args.heads, t);
    const double p = std::exp(score.value - lse), keep = kept(args.terms.dropout, b, args.heads.q_begin + h, t);
    const double ds = p * (keep * dot(dout, keys.v[key]) - delta);
    if (args.dbias.data != nullptr) {
      const std::int64_t at = bias_at(args.dbias, b, s, h) + t.k_position;
      store(args.dbias, at, load(args.dbias, at) + ds);
    }
    const double factor = args.scale * score.slope * ds;
    axpy(factor, keys.k[key], dq);
    axpy(factor, q, sums.dk[key]);
    axpy(keep * p, dout, sums.dv[key]);
  }
  if (args.dq.data != nullptr) add_row(args.dq, b, s, h, dq);
}

// All query heads of one KV head, so that dk and dv have one writer.
void grad_group(const AttendGradArgs& args, const std::vector<std::vector<Seen>>& keys, std::int64_t b, std::int64_t kv) {
  const KeyRows rows{load_rows(args.k, b, kv), load_rows(args.v, b, kv)};
  KeyGradients sums(args);
  for (std::int64_t h = 0; h < args.q.size(2); ++h) {
    if (args.heads.kv_of(h) != kv) continue;
    for (std::int64_t s = 0; s < args.q.size(1); ++s) grad_row(args, rows, keys[static_cast<std::size_t>(s)], b, s, h, sums);
    if (!args.invariant) continue;
    sums.add_to(args, b, kv);
    sums = KeyGradients(args);
  }
  if (!args.invariant) sums.add_to(args, b, kv);
}

class ReferenceKernel final : public AttentionKernel {
 public:
  std::string_view name() const override { return "reference"; }
  Support supports(const AttendTraits&) const override { return {}; }

  void attend(const AttendArgs& args) const override {
    check_args(args);
    const auto keys = visible_keys(args.tiles, args.q.size(1), args.invariant);
    const std::int64_t heads = args.q.size(2);
    parallel_for(args.q.size(0) * heads, [&](std::int64_t i) { attend_head(args, keys, i / heads, i % heads); });
  }

  void attend_grad(const AttendGradArgs& args) const override {
    check_args(args);
    const auto keys = visible_keys(args.tiles, args.q.size(1), args.invariant);
    const std::int64_t heads = args.k.size(2), groups = args.q.size(0) * heads;
    const auto group = [&](std::int64_t i) { grad_group(args, keys, i / heads, i % heads); };
    if (args.dbias.data == nullptr) return parallel_for(groups, group);
    for (std::int64_t i = 0; i < groups; ++i) group(i);  // several may add to one element of dbias
  }
};

}  // namespace

const AttentionKernel& reference_kernel() {
  static const ReferenceKernel kernel;
  return kernel;
}

}  // namespace dattn
