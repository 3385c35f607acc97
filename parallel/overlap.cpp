#include "parallel/overlap.h"

#include <algorithm>

#include "parallel/rank_plan.h"

namespace dattn {
namespace {

class Walk {
 public:
  explicit Walk(const Plan& plan) : plan_(plan), moves_(plan.steps.size()) {
    at_hand_.assign(plan.values.size(), false);
    producer_.assign(plan.values.size(), kNobody);
    for (const ValueId value : plan.inputs) at_hand_[index(value)] = true;
    for (std::size_t i = 0; i < plan.steps.size(); ++i) {
      if (!is_move(plan.steps[i].verb)) continue;
      producer_[index(plan.steps[i].out[0])] = i;
      waiting_.push_back(i);
    }
  }

  std::vector<Action> actions() && {
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
      if (!is_move(plan_.steps[i].verb)) {
        compute(i);
      } else if (moves_[i] == Move::kWaiting) {
        need(plan_.steps[i].in[0]);
        start(i);
      }
    }
    for (const ValueId value : plan_.outputs) take(value);
    while (!under_way_.empty()) wait(under_way_.front());
    return std::move(actions_);
  }

 private:
  enum class Move { kWaiting, kUnderWay, kDone };
  static constexpr std::size_t kNobody = SIZE_MAX;
  static std::size_t index(ValueId value) { return static_cast<std::size_t>(value); }

  void compute(std::size_t step) {
    const Step& computation = plan_.steps[step];
    for (const ValueId value : computation.in) need(value);
    start_ready_moves();
    for (std::size_t j = 0; j < computation.in.size(); ++j) {
      if (computation.in[j] != kNoValue && consumes(computation, j)) take(computation.in[j]);
    }
    actions_.push_back({Action::Kind::kCompute, step});
    for (const ValueId value : computation.out) {
      if (value != kNoValue) at_hand_[index(value)] = true;
    }
  }

  void start_ready_moves() {
    const std::vector<std::size_t> before = waiting_;
    for (const std::size_t move : before) {
      if (at_hand_[index(plan_.steps[move].in[0])]) start(move);
    }
  }

  void need(ValueId value) {
    if (value == kNoValue || producer_[index(value)] == kNobody) return;
    const std::size_t move = producer_[index(value)];
    if (moves_[move] == Move::kWaiting) {
      need(plan_.steps[move].in[0]);
      start(move);
    }
    if (moves_[move] == Move::kUnderWay) wait(move);
  }

  // A value's memory is free to be written once no move sends from it any more.
  void take(ValueId value) {
    need(value);
    const std::vector<std::size_t> before = under_way_;
    for (const std::size_t move : before) {
      if (plan_.steps[move].in[0] == value) wait(move);
    }
  }

  void start(std::size_t move) {
    moves_[move] = Move::kUnderWay;
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), move));
    under_way_.insert(std::lower_bound(under_way_.begin(), under_way_.end(), move), move);
    actions_.push_back({Action::Kind::kStart, move});
  }

  void wait(std::size_t move) {
    moves_[move] = Move::kDone;
    under_way_.erase(std::find(under_way_.begin(), under_way_.end(), move));
    at_hand_[index(plan_.steps[move].out[0])] = true;
    actions_.push_back({Action::Kind::kWait, move});
  }

  const Plan& plan_;
  std::vector<Move> moves_;
  std::vector<bool> at_hand_;
  std::vector<std::size_t> producer_;             // the move that makes each value
  std::vector<std::size_t> waiting_, under_way_;  // moves, in list order
  std::vector<Action> actions_;
};

}  // namespace

std::vector<Action> actions_of(const Plan& plan) { return Walk(plan).actions(); }

}  // namespace dattn
