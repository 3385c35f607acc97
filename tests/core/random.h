// Random cases for property tests.
#pragma once

#include <algorithm>
#include <cstdint>

#include <rapidcheck.h>

#include "core/attention/positions.h"

namespace dattn {

// Uniform in [begin, end), whatever the property's size: rapidcheck's own ranges start out tiny, where regions are
// empty and lists have one element.
inline std::int64_t pick(std::int64_t begin, std::int64_t end) {
  return *rc::gen::resize(rc::kNominalSize, rc::gen::inRange(begin, end));
}

// Half-open, inside [0, length); whole, short or empty.
inline Interval pick_interval(std::int64_t length) {
  if (pick(0, 3) == 0) return {0, length};
  const auto [begin, end] = std::minmax({pick(0, length + 1), pick(0, length + 1)});
  return {begin, end};
}

}  // namespace dattn
