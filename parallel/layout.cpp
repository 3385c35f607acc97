#include "parallel/layout.h"

#include "core/base/error.h"

namespace dattn {

std::string_view name_of(Layout layout) {
  switch (layout) {
    case Layout::kContiguous: return "contiguous";
    case Layout::kZigzag: return "zigzag";
    case Layout::kStriped: return "striped";
    case Layout::kBalanced: return "balanced";
  }
  return "?";
}

Layout layout_from(std::string_view name) {
  for (const Layout layout : {Layout::kContiguous, Layout::kZigzag, Layout::kStriped, Layout::kBalanced}) {
    if (name == name_of(layout)) return layout;
  }
  fail(ErrorCode::kBadInput, "unknown layout '{}'; known: contiguous, zigzag, striped, balanced", name);
}

Positions positions_of(Layout layout, std::int64_t length, int parts, int index) {
  if (parts == 1) return Positions::range(0, length);
  switch (layout) {
    case Layout::kContiguous: {
      const Interval own = split_evenly(length, parts, index);
      return Positions::range(own.begin, own.end);
    }
    case Layout::kZigzag: {
      const Interval early = split_evenly(length, 2 * parts, index);
      const Interval late = split_evenly(length, 2 * parts, 2 * parts - 1 - index);
      return Positions({{early.begin, early.count(), 1}, {late.begin, late.count(), 1}});
    }
    case Layout::kStriped: return Positions({{index, index < length ? (length - index - 1) / parts + 1 : 0, parts}});
    case Layout::kBalanced: break;
  }
  fail(ErrorCode::kInternal, "layout balanced depends on the mask; ask the problem");
}

}  // namespace dattn
