#include "tests/conformance/sweep.h"

#include <algorithm>
#include <cstdlib>
#include <random>
#include <set>
#include <string_view>

#include <fmt/format.h>

#include "parallel/strategy.h"

namespace dattn::conformance {
namespace {

struct Heads {
  std::int64_t heads, kv_heads;
};
struct Lengths {
  std::int64_t batch, seq_q, seq_kv;
};
struct Dims {
  DType dtype;
  std::int64_t dim_qk, dim_v;
};

const std::vector<std::string> kMasks{"full",      "causal",           "causal_bottom_right", "window",  "window_right",
                                      "documents", "documents_window", "documents_end",       "regions", "blind_rows",
                                      "prefix",    "global",           "global_causal",       "blocks",  "padding",
                                      "per_row"};
const std::vector<Layout> kLayouts{Layout::kContiguous, Layout::kZigzag, Layout::kStriped, Layout::kBalanced};
// 9 query heads on 4 ranks, one head on 8 ranks, MQA, GQA groups that ranks cut through.
const std::vector<Heads> kHeads{{4, 4}, {9, 3}, {1, 1}, {6, 1}, {8, 2}, {3, 3}};
// Fewer positions than ranks, one, primes, cross-attention of unequal lengths both ways.
const std::vector<Lengths> kLengths{{1, 61, 61},   {2, 96, 96}, {1, 1, 1},   {3, 5, 5},
                                    {1, 127, 127}, {1, 31, 75}, {2, 75, 31}, {1, 128, 128}};
const std::vector<Dims> kDims{
    {DType::kF32, 16, 16}, {DType::kF32, 24, 8}, {DType::kBF16, 32, 32}, {DType::kF16, 24, 40}, {DType::kF64, 8, 12}};
// What models have, the largest (MLA among them) and the smallest, on short sequences: beside the pairs of the other
// dimensions. One number a head is for fp32: in bf16 single products are off by anything up to a unit, and no mean is a bound.
const std::vector<Dims> kModelDims{{DType::kF32, 64, 64},    {DType::kBF16, 64, 64},   {DType::kF32, 128, 128},
                                   {DType::kBF16, 128, 128}, {DType::kF32, 192, 128},  {DType::kBF16, 192, 128},
                                   {DType::kF32, 256, 256},  {DType::kBF16, 256, 256}, {DType::kF32, 1, 1}};
constexpr std::size_t kModelLengths = 5;  // of kLengths: short, and unequal

// Every way to share out the ranks over the axes, tensor on at most 2.
std::vector<MeshShape> meshes(int ranks) {
  std::vector<MeshShape> all{MeshShape{}};
  for (const Axis axis : {Axis::kRingOuter, Axis::kRing, Axis::kRows, Axis::kUlysses, Axis::kTensor}) {
    std::vector<MeshShape> wider;
    for (const MeshShape& mesh : all) {
      const int left = ranks / mesh.ranks();
      for (int size = 1; size <= (axis == Axis::kTensor ? std::min(2, left) : left); ++size) {
        if (left % size != 0) continue;
        wider.push_back(mesh);
        wider.back().set(axis, size);
      }
    }
    all = std::move(wider);
  }
  std::erase_if(all, [ranks](const MeshShape& mesh) { return mesh.ranks() != ranks; });
  return all;
}

// What is added to the scores or done to the probabilities.
const std::vector<std::string> kTerms{"none", "alibi", "softcap", "dropout", "sink", "bias", "one_bias", "all"};

// Choices by index: mesh, layout, mask, heads, lengths, dims, terms.
using Choice = std::array<std::size_t, 7>;

// Every mesh with every layout and mask; the rest in turn, since pairwise_choice has their pairs.
std::vector<Choice> every_choice(const std::array<std::size_t, 7>& sizes) {
  std::vector<Choice> all;
  std::size_t turn = 0;
  for (std::size_t mesh = 0; mesh < sizes[0]; ++mesh) {
    for (std::size_t layout = 0; layout < sizes[1]; ++layout) {
      for (std::size_t mask = 0; mask < sizes[2]; ++mask, ++turn) {
        all.push_back({mesh, layout, mask, turn % sizes[3], (turn / 2 + turn) % sizes[4], (turn / 3) % sizes[5],
                       (turn * 5 + turn / 7) % sizes[6]});
      }
    }
  }
  return all;
}

// Greedy covering of all pairs of values but those of mesh and mask, which are most of them and meet in the full sweep: each
// choice starts from an uncovered pair and covers as many more as it can. Where it does not run, the pair has kDraws more,
// drawn by chance; then it counts as one that nothing runs with.
template <class Runs>
std::vector<Choice> pairwise_choice(const std::array<std::size_t, 7>& sizes, const Runs& runs) {
  constexpr int kDraws = 50;
  using Pair = std::array<std::size_t, 4>;  // dimension, value, dimension, value
  std::set<Pair> open;
  for (std::size_t a = 0; a < sizes.size(); ++a) {
    for (std::size_t b = a + 1; b < sizes.size(); ++b) {
      if (a == 0 && b == 2) continue;
      for (std::size_t i = 0; i < sizes[a]; ++i) {
        for (std::size_t j = 0; j < sizes[b]; ++j) open.insert({a, i, b, j});
      }
    }
  }
  std::vector<Choice> all;
  std::mt19937 random;  // NOLINT: the same choices every time
  while (!open.empty()) {
    const Pair seed = *open.begin();
    Choice choice{};
    std::array<bool, 7> fixed{};
    choice[seed[0]] = seed[1];
    choice[seed[2]] = seed[3];
    fixed[seed[0]] = fixed[seed[2]] = true;
    for (std::size_t dimension = 0; dimension < sizes.size(); ++dimension) {
      if (fixed[dimension]) continue;
      std::size_t best = 0, best_gain = 0;
      for (std::size_t k = 0; k < sizes[dimension]; ++k) {
        const std::size_t value = (k + all.size()) % sizes[dimension];
        std::size_t gain = 0;
        for (std::size_t other = 0; other < sizes.size(); ++other) {
          if (!fixed[other]) continue;
          gain += open.count(other < dimension ? Pair{other, choice[other], dimension, value}
                                               : Pair{dimension, value, other, choice[other]});
        }
        if (k == 0 || gain > best_gain) best = value, best_gain = gain;
      }
      choice[dimension] = best;
      fixed[dimension] = true;
    }
    bool found = runs(choice);
    for (int draw = 0; draw < kDraws && !found; ++draw) {
      for (std::size_t dimension = 0; dimension < sizes.size(); ++dimension) {
        if (dimension != seed[0] && dimension != seed[2]) choice[dimension] = random() % sizes[dimension];
      }
      found = runs(choice);
    }
    open.erase(seed);
    if (!found) continue;
    for (std::size_t a = 0; a < sizes.size(); ++a) {
      for (std::size_t b = a + 1; b < sizes.size(); ++b) open.erase({a, choice[a], b, choice[b]});
    }
    all.push_back(choice);
  }
  return all;
}

// One choice for each of kModelDims, whose numbers follow those of kDims; every strategy and number of ranks has others. The
// meshes among them are all, data axis included.
std::vector<Choice> model_choices(const std::array<std::size_t, 7>& sizes, std::size_t turn) {
  std::vector<Choice> all;
  for (std::size_t i = 0; i < kModelDims.size(); ++i, ++turn) {
    all.push_back({turn % sizes[0], (turn / 2 + i) % sizes[1], (5 * turn + i) % sizes[2], (turn + turn / 6) % sizes[3],
                   kModelLengths, kDims.size() + i, (3 * turn + i) % sizes[6]});
  }
  return all;
}

AttentionShape with_terms(const std::string& terms, AttentionShape shape) {
  shape.sink = terms == "sink" || terms == "all";
  if (terms == "bias" || terms == "all") shape.bias = BiasShape{true, true};
  if (terms == "one_bias") shape.bias = BiasShape{false, false};
  return shape;
}

}  // namespace

std::string Case::problem_text() const {
  return fmt::format("mask {}, batch {}, seq {} x {}, heads {}/{}, dims {}/{}, {}, terms {}", mask, shape.batch, shape.seq_q,
                     shape.seq_kv, shape.heads, shape.kv_heads, shape.dim_qk, shape.dim_v, name_of(shape.dtype), terms);
}

std::string Case::text() const {
  return fmt::format("{} on {}, layout {}, {}", strategy, mesh.text(), name_of(layout), problem_text());
}

AttentionOptions options_of(const Case& one) {
  if (one.drawn) return *one.drawn;
  AttentionOptions options;
  options.mask = mask_named(one.mask, one.shape);
  options.layout = one.layout;
  options.strategy = one.strategy;
  const bool all = one.terms == "all";
  if (all || one.terms == "softcap") options.softcap = 1.5;
  if (all || one.terms == "dropout") options.dropout = 0.3, options.dropout_seed = 11;
  if (all || one.terms == "alibi") {
    for (std::int64_t head = 0; head < one.shape.heads; ++head)
      options.alibi_slopes.push_back(0.02 * static_cast<double>(head + 1));
  }
  return options;
}

Mask mask_named(const std::string& name, const AttentionShape& shape) {
  const std::int64_t seq_q = shape.seq_q, seq_kv = shape.seq_kv;
  if (name == "padding") {
    std::vector<std::int64_t> lengths;
    for (std::int64_t row = 0; row < shape.batch; ++row)
      lengths.push_back(std::max(seq_q, seq_kv) * (shape.batch - row) / shape.batch);
    return Mask::padding(std::move(lengths), Mask::causal());
  }
  if (name == "per_row") {
    std::vector<Mask> rows;
    for (std::int64_t row = 0; row < shape.batch; ++row) rows.push_back(row == 1 ? Mask::window(3, 4) : Mask::causal());
    return Mask::per_row(std::move(rows));
  }
  const std::int64_t shorter = std::min(seq_q, seq_kv);
  if (name == "full") return Mask::full();
  if (name == "causal") return Mask::causal();
  if (name == "window") return Mask::window(7, 0);
  if (name == "window_right") return Mask::window(5, 9);
  const std::vector<std::int64_t> bounds{0, shorter / 7, shorter / 3, shorter / 3,
                                         shorter - shorter / 5};  // an empty document, a blind tail
  if (name == "documents") return Mask::documents(bounds, Mask::causal());
  if (name == "documents_window") return Mask::documents(bounds, Mask::window(4, 2));
  if (name == "documents_end") {  // packed sequences of unequal lengths, the last tokens of both aligned
    return Mask::documents({0, seq_q / 3, seq_q / 2, seq_q}, Mask::causal_bottom_right(), {0, seq_kv / 2, seq_kv / 2, seq_kv});
  }
  if (name == "causal_bottom_right") return Mask::causal_bottom_right();
  if (name == "prefix") return Mask::prefix(seq_kv / 3);
  if (name == "global") return Mask::global(std::min<std::int64_t>(3, seq_kv), 6, 2);
  if (name == "global_causal") return Mask::global(std::min<std::int64_t>(2, seq_kv), 9, 0, true);
  if (name == "blocks") {
    std::vector<Mask::BlockPair> list;
    const std::int64_t size = 12, q_blocks = (seq_q + size - 1) / size, k_blocks = (seq_kv + size - 1) / size;
    for (std::int64_t q = 0; q < q_blocks; ++q) {
      for (std::int64_t k = 0; k < k_blocks; ++k) {
        if (k == 0 || k == q || (q + 2 * k) % 5 == 3) list.push_back({q, k});
      }
    }
    return Mask::blocks(size, std::move(list));
  }
  const std::int64_t q_half = seq_q / 2, k_third = seq_kv / 3;
  if (name == "regions") {
    return Mask::of_regions({{{0, q_half}, {0, k_third}, -8, 3},
                             {{q_half, seq_q}, {k_third, seq_kv}, -kUnbounded, 2},
                             {{0, q_half}, {k_third, seq_kv}, -2, kUnbounded},
                             {{q_half, q_half}, {0, 0}, -kUnbounded, kUnbounded}});
  }
  return Mask::of_regions(
      {{{q_half, seq_q}, {0, k_third}, -kUnbounded, kUnbounded}});  // blind_rows: the first half sees nothing
}

std::vector<Case> sweep(const std::string& strategy, int ranks, bool full) {
  const Strategy& wanted = find_strategy(strategy);
  const auto accepts = [&wanted](const MeshShape& mesh, const AttentionShape& shape, const AttentionOptions& options) {
    return wanted.accepts(*make_problem(mesh, shape, options)).ok;
  };
  std::vector<MeshShape> accepted;
  const auto add = [&](const MeshShape& mesh) {
    if (accepts(mesh, {.seq_q = 1, .seq_kv = 1}, {})) accepted.push_back(mesh);
  };
  for (const MeshShape& mesh : meshes(ranks)) add(mesh);
  if (accepted.empty()) return {};
  std::array<std::size_t, 7> sizes{accepted.size(), kLayouts.size(), kMasks.size(), kHeads.size(),
                                   kLengths.size(), kDims.size(),    kTerms.size()};
  const auto case_of = [&](const Choice& choice) {
    const Heads& heads = kHeads[choice[3]];
    const Lengths& lengths = kLengths[choice[4]];
    const Dims& dims = choice[5] < kDims.size() ? kDims[choice[5]] : kModelDims[choice[5] - kDims.size()];
    return Case{strategy,
                accepted[choice[0]],
                kLayouts[choice[1]],
                kMasks[choice[2]],
                with_terms(kTerms[choice[6]], {lengths.batch, lengths.seq_q, lengths.seq_kv, heads.heads, heads.kv_heads,
                                               dims.dim_qk, dims.dim_v, dims.dtype}),
                kTerms[choice[6]]};
  };
  const auto runs = [&](const Choice& choice) {
    const Case one = case_of(choice);
    return accepts(one.mesh, one.shape, options_of(one));
  };
  std::vector<Choice> choices = pairwise_choice(sizes, runs);
  if (full) {
    const std::vector<Choice> every = every_choice(sizes);
    choices.insert(choices.end(), every.begin(), every.end());
  }
  for (MeshShape half : ranks % 2 == 0 ? meshes(ranks / 2) : std::vector<MeshShape>{}) {
    half.set(Axis::kData, 2);
    add(half);
  }
  sizes[0] = accepted.size();
  const std::vector<Choice> models = model_choices(sizes, strategy.size() * 8 + static_cast<std::size_t>(ranks));
  choices.insert(choices.end(), models.begin(), models.end());
  std::vector<Case> cases;
  for (const Choice& choice : choices) {
    if (runs(choice)) cases.push_back(case_of(choice));
  }
  return cases;
}

bool full_sweep() {
  const char* value = std::getenv("DATTN_SWEEP");
  return value != nullptr && std::string_view(value) == "full";
}

DeviceOptions test_devices() {
  DeviceOptions options{.ranks_per_device = 64};
  const auto named = [](const char* variable, auto& choice) {
    const char* value = std::getenv(variable);
    for (const auto& [name, one] : ConfigNames<std::remove_reference_t<decltype(choice)>>::kAll) {
      if (value != nullptr && name == value) choice = one;
    }
  };
  named("DATTN_TEST_DEVICE", options.device);
  named("DATTN_TEST_TRANSFERS", options.transfers);
  if (const char* ranks = std::getenv("DATTN_TEST_RANKS_PER_DEVICE")) options.ranks_per_device = std::max(1, std::atoi(ranks));
  return options;
}

std::uint64_t sweep_seed() {
  const char* value = std::getenv("DATTN_SEED");
  return value != nullptr ? std::strtoull(value, nullptr, 10) : 20261124;
}

}  // namespace dattn::conformance
