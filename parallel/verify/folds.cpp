#include "parallel/verify/folds.h"

#include <algorithm>

namespace dattn::proof {
namespace {

Interval shared(const Interval& a, const Interval& b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

}  // namespace

Folds::Folds(const Plan& plan, Blocks& blocks)
    : plan_(plan),
      blocks_(blocks),
      group_(plan.problem->shape.heads / plan.problem->shape.kv_heads),
      writers_(plan.values.size(), kNoStep) {
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    for (const ValueId value : plan.steps[i].out) {
      if (value != kNoValue) writers_[static_cast<std::size_t>(value)] = i;
    }
  }
}

const Step* Folds::writer(ValueId value) const {
  const std::size_t step = writers_[static_cast<std::size_t>(value)];
  return step == kNoStep ? nullptr : &plan_.steps[step];
}

bool Folds::collect(ValueId value, int rank, int shard, Interval query_heads) {
  // Where nothing is folded in twice, no value of no rank is met twice.
  const auto most = static_cast<std::int64_t>(plan_.values.size() + 1) * blocks_.ranks();
  shard_ = shard;
  visits_ = 0;
  leaves_.clear();
  pending_.assign(1, {value, rank, kWhole, query_heads});
  while (!pending_.empty() && visits_ <= most) {
    const Part part = pending_.back();
    pending_.pop_back();
    follow(part);
  }
  return visits_ <= most;
}

void Folds::follow(Part part) {
  while (part.value != kNoValue) {
    ++visits_;
    const std::size_t index = writers_[static_cast<std::size_t>(part.value)];
    if (index == kNoStep) return;
    const Step& step = plan_.steps[index];
    if (step.verb == Verb::kAttend) add_leaf(part, index, false);
    if (step.verb == Verb::kAttendGrad) add_leaf(part, index, part.value == step.out[1]);
    if (is_move(step.verb) && step.verb != Verb::kRotate) return spread(part, step);
    part = behind(part, step);
  }
}

// What the value was made from on a single rank; of the two summands of an add, one is kept for later.
Folds::Part Folds::behind(const Part& part, const Step& step) {
  Part next = part;
  switch (step.verb) {
    case Verb::kAttend: next.value = step.in.size() > 2 ? step.in[2] : kNoValue; break;
    case Verb::kAttendGrad: next.value = part.value == step.out[1] ? step.in[4] : step.in[3]; break;
    case Verb::kAdd:
      next.value = step.in[1];
      pending_.push_back(next);
      next.value = step.in[0];
      break;
    case Verb::kRotate: {
      const int size = plan_.problem->mesh.size(step.axis);
      const int from = around(blocks_.coordinate(part.rank, step.axis) - step.shift, size);
      next.rank = blocks_.neighbour(part.rank, step.axis, from);
      next.value = step.in[0];
      break;
    }
    default: next.value = step.in[0];
  }
  return next;
}

// A move of several peers: the part comes from every rank of the axis that holds the shard and some of the heads.
void Folds::spread(const Part& part, const Step& step) {
  const ValueId in = step.in[0];
  for (int i = 0; i < plan_.problem->mesh.size(step.axis); ++i) {
    const int rank = blocks_.neighbour(part.rank, step.axis, i);
    const HeadRange& held = blocks_.heads(in, rank);
    const Interval heads = shared(part.heads, key_side(in) ? Interval{held.kv.begin * group_, held.kv.end * group_} : held.q);
    if (heads.count() <= 0) continue;
    for (const Atom& atom : blocks_.atoms_of_shard(blocks_.block(in, rank), shard_))
      pending_.push_back({in, rank, blocks_.both(part.within, atom.within), heads});
  }
}

void Folds::add_leaf(const Part& part, std::size_t index, bool key_side) {
  const Step& step = plan_.steps[index];
  const ValueId own = step.in[key_side ? 1 : 0], other = step.in[key_side ? 0 : 1];
  const Interval heads = shared(part.heads, blocks_.heads(step.in[0], part.rank).q);
  if (heads.count() <= 0) return;
  for (const Atom& atom : blocks_.atoms_of_shard(blocks_.block(own, part.rank), shard_))
    leaves_.push_back({index, part.rank, blocks_.block(other, part.rank), blocks_.both(part.within, atom.within), heads});
}

bool Folds::find_attend(bool key_side, int shard, int other_shard, std::int64_t head, std::size_t& step, int& rank) {
  for (step = 0; step < plan_.steps.size(); ++step) {
    const Step& attend = plan_.steps[step];
    if (attend.verb != Verb::kAttend && attend.verb != Verb::kAttendGrad) continue;
    for (rank = 0; rank < blocks_.ranks(); ++rank) {
      const Interval& heads = blocks_.heads(attend.in[0], rank).q;
      const int own = blocks_.block(attend.in[key_side ? 1 : 0], rank),
                other = blocks_.block(attend.in[key_side ? 0 : 1], rank);
      if (head >= heads.begin && head < heads.end && !blocks_.atoms_of_shard(own, shard).empty() &&
          !blocks_.atoms_of_shard(other, other_shard).empty())
        return true;
    }
  }
  return false;
}

}  // namespace dattn::proof
