// The text that every instruction set compiles; see ops.h.
#pragma once

#include "core/attention/cpu/backward_text.h"
#include "core/attention/cpu/decode_text.h"
#include "core/attention/cpu/forward_text.h"
#include "core/attention/cpu/peak_text.h"

namespace dattn::cpu::DATTN_ISA {

template <class Storage, class Unit>
constexpr Ops ops_of() {
  return {kPanel,
          kLanes,
          UnitOf<Unit>::kElements,
          pack_columns<Storage, Unit>,
          pack_rows<Storage, Unit>,
          forward_scratch<Unit>,
          forward<Storage, Unit>,
          backward_scratch<Unit>,
          backward<Storage, Unit>,
          decode_scratch<Unit>,
          decode<Storage, Unit>,
          add_rows,
          multiply_adds<Unit>};
}

}  // namespace dattn::cpu::DATTN_ISA
