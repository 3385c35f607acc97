// The masks of random calls.
#include <algorithm>

#include "tests/conformance/random_call.h"

namespace dattn::conformance {
namespace {

constexpr std::int64_t kMostDocuments = 3000;

}  // namespace

Mask RandomCalls::some_mask(const AttentionShape& shape) {
  const std::int64_t longest = std::max(shape.seq_q, shape.seq_kv);
  if (chance(8)) {
    std::vector<std::int64_t> lengths;
    const std::int64_t rows = nonsense_ && chance(10) ? pick(0, 5) : shape.batch;
    for (std::int64_t row = 0; row < rows; ++row) lengths.push_back(odd(pick(0, longest), longest));
    return Mask::padding(std::move(lengths), band());
  }
  if (chance(8)) {
    std::vector<Mask> masks;
    const std::int64_t rows = nonsense_ && chance(10) ? pick(0, 5) : shape.batch;
    for (std::int64_t row = 0; row < rows; ++row) {
      const bool repeat = row > 0 && chance(40);
      masks.push_back(repeat ? masks.back() : row_mask(shape.seq_q, shape.seq_kv));
      if (nonsense_ && chance(5)) masks.back() = Mask::padding({shape.seq_q});
    }
    return Mask::per_row(std::move(masks));
  }
  Mask mask = row_mask(shape.seq_q, shape.seq_kv);
  if (nonsense_ && chance(kOddPercent)) mask.align = Mask::Align::kEnd;
  return mask;
}

Mask RandomCalls::row_mask(std::int64_t seq_q, std::int64_t seq_kv) {
  const auto side = [&] { return odd(chance(25) ? -1 : pick(0, chance(50) ? 12 : std::max(seq_q, seq_kv)), seq_kv); };
  switch (pick(0, 8)) {
    case 0: return Mask::prefix(odd(pick(0, seq_kv), seq_kv));
    case 1: return Mask::global(odd(pick(0, std::min<std::int64_t>(20, seq_kv)), seq_kv), side(), side(), chance(50));
    case 2: return blocks(seq_q, seq_kv);
    case 3: return regions(seq_q, seq_kv);
    case 4:
    case 5: return documents(seq_q, seq_kv);
    default: return band();
  }
}

Mask RandomCalls::band() {
  const Mask::Align align = chance(20) ? Mask::Align::kEnd : Mask::Align::kStart;
  const auto side = [&] { return odd(chance(20) ? -1 : pick(0, 40), 0); };
  switch (nonsense_ && chance(kOddPercent) ? 4 : pick(0, 3)) {
    case 0: return Mask::full();
    case 1: return Mask::causal(align);
    case 2: return Mask::causal_bottom_right();
    case 3: return Mask::window(side(), side(), align);
    default: return Mask::prefix(1);  // which is no band
  }
}

std::vector<std::int64_t> RandomCalls::boundaries(std::int64_t length, std::int64_t count) {
  std::vector<std::int64_t> bounds{odd(0, 1)};
  for (std::int64_t i = 0; i < count; ++i) bounds.push_back(pick(0, length));
  std::sort(bounds.begin() + 1, bounds.end());
  if (chance(60)) bounds.back() = length;
  if (!nonsense_ || !chance(10)) return bounds;
  if (chance(50)) bounds[static_cast<std::size_t>(pick(0, count))] = odd(pick(-1, length), length);
  if (chance(20)) bounds.resize(static_cast<std::size_t>(pick(0, 1)));
  if (chance(30) && !bounds.empty()) bounds.back() = length + pick(1, 3);
  return bounds;
}

Mask RandomCalls::documents(std::int64_t seq_q, std::int64_t seq_kv) {
  const bool many = size_ != Size::kSmall && chance(15);
  const std::int64_t count = many ? pick(1000, kMostDocuments) : pick(1, 9);
  if (chance(70)) return Mask::documents(boundaries(std::max(seq_q, seq_kv), count), band());
  const std::int64_t kv_count = nonsense_ && chance(10) ? count + 1 : count;
  return Mask::documents(boundaries(seq_q, count), band(), boundaries(seq_kv, kv_count));
}

Mask RandomCalls::blocks(std::int64_t seq_q, std::int64_t seq_kv) {
  const std::int64_t size = std::max<std::int64_t>(1, std::max(seq_q, seq_kv) / pick(1, 12)) + pick(0, 1);
  const std::int64_t rows = (seq_q + size - 1) / size, columns = (seq_kv + size - 1) / size;
  std::vector<Mask::BlockPair> list;
  for (std::int64_t q = 0; q < rows; ++q) {
    for (std::int64_t k = 0; k < columns; ++k) {
      if (chance(35)) list.push_back({odd(q, rows), odd(k, columns)});
    }
  }
  std::shuffle(list.begin(), list.end(), random_);
  if (nonsense_ && chance(kOddPercent) && !list.empty()) list.push_back(list.front());
  return Mask::blocks(odd(size, 0), std::move(list));
}

// Cells of a grid, each with a band: disjoint, unless they overlap on purpose.
Mask RandomCalls::regions(std::int64_t seq_q, std::int64_t seq_kv) {
  const auto cuts = [&](std::int64_t length) {
    std::vector<std::int64_t> list{0, length};
    for (std::int64_t i = pick(0, 3); i > 0; --i) list.push_back(pick(0, length));
    std::sort(list.begin(), list.end());
    return list;
  };
  const std::vector<std::int64_t> q = cuts(seq_q), k = cuts(seq_kv);
  const Mask::Overlap overlap = chance(30) ? Mask::Overlap::kFirst : Mask::Overlap::kRefuse;
  const bool wide = overlap == Mask::Overlap::kFirst || (nonsense_ && chance(10));
  std::vector<Region> list;
  for (std::size_t i = 0; i + 1 < q.size(); ++i) {
    for (std::size_t j = 0; j + 1 < k.size(); ++j) {
      if (!chance(60)) continue;
      Region cell{{odd(q[i], seq_q), odd(q[i + 1], seq_q)}, {odd(k[j], seq_kv), odd(k[j + 1], seq_kv)}};
      if (wide && chance(50)) cell.k = {0, seq_kv};
      const std::int64_t middle = (k[j] + k[j + 1]) / 2 - (q[i] + q[i + 1]) / 2;
      if (chance(50)) cell.lo = odd(middle - pick(0, 20), kUnbounded);
      if (chance(50)) cell.hi = odd(middle + pick(-2, 20), kUnbounded);
      list.push_back(cell);
    }
  }
  std::shuffle(list.begin(), list.end(), random_);
  return Mask::of_regions(std::move(list), overlap);
}

}  // namespace dattn::conformance
