// The memory of a runner, followed through its actions.
#include <algorithm>
#include <utility>

#include "parallel/message.h"
#include "parallel/overlap.h"
#include "parallel/rank_plan.h"

namespace dattn {
namespace {

class Memory {
 public:
  Memory(const Plan& plan, const RankPlan& mine)
      : plan_(plan), mine_(mine), last_use_(last_uses(plan)), values_(plan.values.size(), 0), messages_(plan.steps.size(), 0) {
    travels_.assign(plan.values.size(), false);
    packed_.assign(plan.values.size(), false);
    senders_.assign(plan.values.size(), 0);
    for (const Step& step : plan.steps) {
      if (step.verb != Verb::kRotate) continue;
      for (const ValueId value : {step.in[0], step.out[0]}) travels_[index(value)] = true;
    }
  }

  std::int64_t peak() && {
    for (const Action& action : actions_of(plan_)) {
      if (action.kind == Action::Kind::kStart) start(action.step);
      if (action.kind == Action::Kind::kWait) wait(action.step, action.at);
      if (action.kind == Action::Kind::kCompute) compute(action.step);
    }
    return peak_;
  }

 private:
  static std::size_t index(ValueId value) { return static_cast<std::size_t>(value); }
  What what(ValueId value) const { return plan_.values[index(value)].what; }
  std::int64_t batch() const { return plan_.problem->shape.batch; }

  void add(std::int64_t bytes) { peak_ = std::max(peak_, now_ += bytes); }
  void pass_through(std::int64_t bytes) { peak_ = std::max(peak_, now_ + bytes); }  // held for a moment
  void allocate(ValueId value) {
    add(values_[index(value)] = bytes_of(plan_, value, mine_.blocks[index(value)]));
    packed_[index(value)] = travels_[index(value)];
  }
  void release(ValueId value) { now_ -= std::exchange(values_[index(value)], 0); }
  void release_if_used(ValueId value, std::size_t at) {
    if (value != kNoValue && last_use_[index(value)] <= static_cast<int>(at) && senders_[index(value)] == 0) release(value);
  }

  std::vector<Field> fields_of_move(const Step& step) const {
    return message_fields(step.verb, what(step.out[0]), plan_.problem->shape);
  }

  std::int64_t to_others(const std::vector<Piece>& pieces, const Step& step) const {
    const int own = plan_.problem->mesh.coordinate(mine_.rank, step.axis);
    const std::vector<Field> fields = fields_of_move(step);
    std::int64_t bytes = 0;
    for (const Piece& piece : pieces) bytes += piece.peer == own ? 0 : piece_bytes(fields, batch(), piece);
    return bytes;
  }

  void start(std::size_t i) {
    const Step& step = plan_.steps[i];
    const bool rotates = step.verb == Verb::kRotate;
    allocate(step.out[0]);
    if (!rotates || !packed_[index(step.in[0])]) messages_[i] += to_others(mine_.steps[i].sends, step);
    if (!rotates) messages_[i] += to_others(mine_.steps[i].receives, step);
    add(messages_[i]);
    ++senders_[index(step.in[0])];
  }

  void wait(std::size_t i, std::size_t at) {
    const Step& step = plan_.steps[i];
    if (step.verb == Verb::kCombine) {  // merged in the type of sums, piece by piece
      const std::vector<Field> fields = fields_of(What::kState, plan_.problem->shape);
      for (const Piece& piece : mine_.steps[i].receives) pass_through(piece_bytes({&fields[1], 1}, batch(), piece));
    }
    now_ -= std::exchange(messages_[i], 0);
    --senders_[index(step.in[0])];
    const bool in_use = last_use_[index(step.in[0])] == static_cast<int>(at);  // by the step that waits
    if (!in_use) release_if_used(step.in[0], at);
  }

  // A computation writes into memory that it takes over, or else into new memory.
  void compute(std::size_t i) {
    const Step& step = plan_.steps[i];
    const auto make = [&](ValueId out, ValueId taken) {
      if (out == kNoValue) return;
      if (taken == kNoValue) return allocate(out);
      values_[index(out)] = std::exchange(values_[index(taken)], 0);
      packed_[index(out)] = packed_[index(taken)];
    };
    switch (step.verb) {
      case Verb::kAttend: make(step.out[0], step.in.size() > 2 ? step.in[2] : kNoValue); break;
      case Verb::kAttendGrad:
        make(step.out[0], step.in[3]);
        make(step.out[1], step.in[4]);
        break;
      case Verb::kFinish: finish(step); break;
      default: make(step.out[0], step.in[0]); break;
    }
    for (const ValueId value : step.in) release_if_used(value, i);
  }

  // Statistics stay where they are; out is converted.
  void finish(const Step& step) {
    const AttentionShape& shape = plan_.problem->shape;
    const std::int64_t result = bytes_of(plan_, step.out[0], mine_.blocks[index(step.out[0])]);
    if (shape.dtype != accumulate_type(shape.dtype)) {
      const Block& block = mine_.blocks[index(step.out[0])];
      const std::vector<Field> fields = fields_of(What::kResult, shape);
      pass_through(piece_bytes({&fields[1], 1}, batch(), {0, 0, block.rows.count(), block.heads.q, 1}));
    }
    now_ += result - std::exchange(values_[index(step.in[0])], 0);
    values_[index(step.out[0])] = result;
  }

  const Plan& plan_;
  const RankPlan& mine_;
  std::vector<int> last_use_;
  std::vector<std::int64_t> values_;    // bytes held of each value
  std::vector<std::int64_t> messages_;  // and of each move's messages
  std::vector<bool> travels_;           // made in one block of memory
  std::vector<bool> packed_;            // lies in such a block, so that it is sent as it is
  std::vector<int> senders_;            // moves under way that send from each value
  std::int64_t now_ = 0, peak_ = 0;
};

}  // namespace

std::int64_t runner_memory(const Plan& plan, const RankPlan& mine) { return Memory(plan, mine).peak(); }

}  // namespace dattn
