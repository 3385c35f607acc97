#include "parallel/overlap.h"

#include <algorithm>
#include <set>

#include "parallel/rank_plan.h"

namespace dattn {
namespace {

class Walk {
 public:
  explicit Walk(const Plan& plan) : plan_(plan), moves_(plan.steps.size()) {
    producer_.assign(plan.values.size(), kNobody);
    movers_.resize(plan.values.size());
    for (std::size_t i = 0; i < plan.steps.size(); ++i) {
      if (!is_move(plan.steps[i].verb)) continue;
      producer_[index(plan.steps[i].out[0])] = i;
      movers_[index(plan.steps[i].in[0])].push_back(i);
    }
    for (const ValueId value : plan.inputs) set_at_hand(value);
  }

  std::vector<Action> actions() && {
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
      position_ = i;
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
    actions_.push_back({Action::Kind::kCompute, step, position_});
    for (const ValueId value : computation.out) {
      if (value != kNoValue) set_at_hand(value);
    }
  }

  void set_at_hand(ValueId value) {
    for (const std::size_t move : movers_[index(value)]) {
      if (moves_[move] == Move::kWaiting) ready_.insert(move);
    }
  }

  void start_ready_moves() {
    while (!ready_.empty()) start(*ready_.begin());
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
    ready_.erase(move);
    under_way_.insert(std::lower_bound(under_way_.begin(), under_way_.end(), move), move);
    actions_.push_back({Action::Kind::kStart, move, position_});
  }

  void wait(std::size_t move) {
    moves_[move] = Move::kDone;
    under_way_.erase(std::find(under_way_.begin(), under_way_.end(), move));
    set_at_hand(plan_.steps[move].out[0]);
    actions_.push_back({Action::Kind::kWait, move, position_});
  }

  const Plan& plan_;
  std::vector<Move> moves_;
  std::vector<std::size_t> producer_;             // the move that makes each value
  std::vector<std::vector<std::size_t>> movers_;  // the moves that read each value
  std::set<std::size_t> ready_;                   // moves that wait, with their input at hand
  std::vector<std::size_t> under_way_;            // moves, in list order
  std::size_t position_ = 0;
  std::vector<Action> actions_;
};

}  // namespace

std::vector<Action> actions_of(const Plan& plan) { return Walk(plan).actions(); }

}  // namespace dattn
