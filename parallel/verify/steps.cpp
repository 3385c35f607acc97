// Rotations and computations: that the blocks of inputs and outputs match on every rank, and what a rank's plan promises.
//
// Values with the same root and the same way back to it match on all ranks at once; only others are compared rank by rank.
#include <algorithm>

#include "core/base/error.h"
#include "parallel/verify/proof.h"

namespace dattn::proof {
namespace {

class Steps {
 public:
  Steps(const Plan& plan, Blocks& blocks, Findings& findings) : plan_(plan), blocks_(blocks), findings_(findings) {}

  void check(std::size_t index) {
    const Step& step = plan_.steps[index];
    const auto equal = [&](ValueId a, ValueId b) {
      if (a != kNoValue && b != kNoValue) match(index, a, b, Axis::kData, 0);
    };
    switch (step.verb) {
      case Verb::kRotate: return match(index, step.out[0], step.in[0], step.axis, step.shift);
      case Verb::kFinish: return equal(step.in[0], step.out[0]);
      case Verb::kAdd: equal(step.in[0], step.out[0]); return equal(step.in[1], step.out[0]);
      case Verb::kAttend:
        if (step.in.size() > 2) equal(step.in[2], step.out[0]);
        equal(step.in[0], step.out[0]);
        return check_heads(index);
      case Verb::kAttendGrad:
        equal(step.in[2], step.in[0]);
        equal(step.in[3], step.out[0]);
        equal(step.in[4], step.out[1]);
        equal(step.in[0], step.out[0]);
        equal(step.in[1], step.out[1]);
        return check_heads(index);
      default: return;
    }
  }

 private:
  // On every rank `a` holds the rows and heads that `b` holds `shift` ranks earlier on the axis.
  void match(std::size_t index, ValueId a, ValueId b, Axis axis, int shift) {
    if (blocks_.placed_alike(a, b, axis, shift)) return;
    const int size = plan_.problem->mesh.size(axis);
    for (int rank = 0; rank < blocks_.ranks(); ++rank) {
      const int other = blocks_.neighbour(rank, axis, around(blocks_.coordinate(rank, axis) - shift, size));
      if (!match_on(index, a, rank, b, other)) return;
    }
  }

  bool match_on(std::size_t index, ValueId a, int rank, ValueId b, int other) {
    const Block here = plan_.block(a, rank), there = plan_.block(b, other);
    const What side = plan_.values[static_cast<std::size_t>(a)].what;
    const std::string where = other == rank ? "" : fmt::format(" on rank {}", other);
    const auto names = [&] { return std::pair(plan_.value_name(a), plan_.value_name(b)); };
    if (const Interval heads = here.heads_for(side), theirs = there.heads_for(side);
        !(heads == theirs) && (heads.count() > 0 || theirs.count() > 0)) {
      findings_.add(rank, index, "{} holds heads {} where {}{} holds heads {} (positions {})", names().first, text_of(heads),
                    names().second, where, text_of(theirs), text_of(here.rows));
      return false;
    }
    if (here.rows == there.rows) return true;
    const Positions extra = missing_from(here.rows, there.rows), lacks = missing_from(there.rows, here.rows);
    if (extra.count() > 0) {
      findings_.add(rank, index, "{} holds positions {} where {}{} does not", names().first, text_of(extra), names().second,
                    where);
    } else if (lacks.count() > 0) {
      findings_.add(rank, index, "{} lacks positions {} where {}{} holds them", names().first, text_of(lacks), names().second,
                    where);
    } else {
      findings_.add(rank, index, "{} holds positions {} in another order than {}{}", names().first, text_of(here.rows),
                    names().second, where);
    }
    return false;
  }

  void check_heads(std::size_t index) {
    const Step& step = plan_.steps[index];
    const std::int64_t group = plan_.problem->shape.heads / plan_.problem->shape.kv_heads;
    for (int rank = 0; rank < blocks_.ranks(); ++rank) {
      const Interval &queries = blocks_.heads(step.in[0], rank).q, &keys = blocks_.heads(step.in[1], rank).kv;
      if (queries.count() == 0 || (queries.begin >= keys.begin * group && queries.end <= keys.end * group)) continue;
      return findings_.add(rank, index, "query heads {} of {} find only KV heads {} in {} (positions {})", text_of(queries),
                           plan_.value_name(step.in[0]), text_of(keys), plan_.value_name(step.in[1]),
                           text_of(plan_.rows(step.in[1], rank)));
    }
  }

  const Plan& plan_;
  Blocks& blocks_;
  Findings& findings_;
};

// The most bytes of the plan's own values alive at once on a rank: each lives from the step that writes it to the last that
// reads it, or until a step takes its memory.
struct Peak {
  std::int64_t bytes = 0;
  std::size_t step = 0;
};

Peak peak_of(const Plan& plan, Blocks& blocks, int rank) {
  const std::vector<int> last = last_uses(plan);
  std::vector<std::int64_t> change(plan.steps.size() + 2, 0);  // between the steps
  std::vector<std::size_t> dies(plan.values.size());
  for (std::size_t i = plan.steps.size(); i-- > 0;) {
    const Step& step = plan.steps[i];
    for (const ValueId value : step.out) {
      if (value == kNoValue) continue;
      const auto v = static_cast<std::size_t>(value);
      const std::size_t end = dies[v] != 0 ? dies[v] : std::max(i, static_cast<std::size_t>(std::max(last[v], 0))) + 1;
      Block held;
      held.rows = Positions::range(0, blocks.row_count(value, rank));
      held.heads = blocks.heads(value, rank);
      const std::int64_t bytes = bytes_of(plan, value, held);
      change[i] += bytes;
      change[std::min(end, plan.steps.size())] -= bytes;
    }
    for (std::size_t j = 0; j < step.in.size(); ++j) {
      if (step.in[j] != kNoValue && consumes(step, j)) dies[static_cast<std::size_t>(step.in[j])] = i;
    }
  }
  Peak peak;
  std::int64_t now = 0;
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    now += change[i];
    if (now > peak.bytes) peak = {now, i};
  }
  return peak;
}

}  // namespace

void check_steps(const Plan& plan, Blocks& blocks, Findings& findings) {
  Steps steps(plan, blocks, findings);
  for (std::size_t i = 0; i < plan.steps.size() && !findings.full(); ++i) steps.check(i);
}

void check_rank(const Plan& plan, Blocks& blocks, const RankPlan& mine, Findings& findings) {
  const Peak peak = peak_of(plan, blocks, mine.rank);
  if (peak.bytes != mine.cost.values_memory || peak.bytes > mine.cost.peak_memory) {
    findings.add(mine.rank, peak.step, "the values alive need {} bytes, but the plan promises {}, and {} with its messages",
                 peak.bytes, mine.cost.values_memory, mine.cost.peak_memory);
  }
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    if (step.verb != Verb::kRotate) continue;
    const auto whole = [&](const std::vector<Piece>& pieces, ValueId value, int shift) {
      const std::int64_t rows = blocks.row_count(value, mine.rank);
      const HeadRange& held = blocks.heads(value, mine.rank);
      const Interval heads = is_key_side(plan.values[static_cast<std::size_t>(value)].what) ? held.kv : held.q;
      if (rows == 0 || heads.count() == 0) return pieces.empty();
      const int peer = around(blocks.coordinate(mine.rank, step.axis) + shift, plan.problem->mesh.size(step.axis));
      return pieces.size() == 1 && pieces[0].peer == peer && pieces[0].row == 0 && pieces[0].rows == rows &&
             pieces[0].heads == heads;
    };
    if (!whole(mine.steps[i].sends, step.in[0], step.shift) || !whole(mine.steps[i].receives, step.out[0], -step.shift)) {
      findings.add(mine.rank, i, "its messages are not the whole of {} (positions {})", plan.value_name(step.in[0]),
                   text_of(plan.rows(step.in[0], mine.rank)));
    }
  }
}

}  // namespace dattn::proof
