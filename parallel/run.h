// The runner: executes any plan on this rank.
//
// Overlap is one rule: a move starts as soon as its inputs are there, and is waited for when its output is first needed.
// So before every computation the runner starts, in list order, each later move whose inputs are at hand; which ones
// these are follows from the list alone, so all ranks start them in the same order.
#pragma once

#include <vector>

#include "core/attention/kernel.h"
#include "parallel/message.h"
#include "parallel/rank_plan.h"

namespace dattn {

// The tensors of one value on this rank, in the order of fields_of(): [B, rows, heads, width], statistics [B, heads, rows].
struct ValueData {
  Tensor packed;              // one block of memory for all fields, for values that travel; else undefined
  std::vector<Tensor> owned;  // one tensor a field otherwise; empty for inputs
  std::vector<TensorView> fields;
};

class Runner {
 public:
  // All are kept by reference and must outlive the runner.
  Runner(const Plan& plan, const RankPlan& mine, const Mesh& mesh, const AttentionKernel& kernel);

  // inputs: the fields of every plan input, in order. Returns every plan output, as owned tensors.
  std::vector<ValueData> run(const std::vector<std::vector<TensorView>>& inputs, const AttentionCall& call);

 private:
  struct Transfer {
    enum class State { kWaiting, kUnderWay, kDone };
    State state = State::kWaiting;
    Communicator::Ticket ticket = 0;
    std::vector<Tensor> buffers;       // of messages that are not values themselves
    std::vector<TensorView> received;  // messages, by ascending peers
  };

  void start_ready_moves(std::size_t from);
  void start_move(std::size_t index);
  void finish_move(std::size_t index);
  void place_pieces(std::size_t index);
  FieldSet field_set(ValueId value, std::span<const Field> fields);
  void need(ValueId value);  // finishes the move that makes it, if any
  OpLabel label(std::size_t index) const;
  void compute(std::size_t index);
  void attend(const Step& step, const RankStep& mine);
  void attend_grad(const Step& step, const RankStep& mine);
  void finish_state(const Step& step);
  ScoreTerms terms() const;
  void add_values(const Step& step);

  ValueData& data(ValueId value) { return data_[static_cast<std::size_t>(value)]; }
  What what(ValueId value) const { return plan_.values[static_cast<std::size_t>(value)].what; }
  const Block& block(ValueId value) const { return mine_.blocks[static_cast<std::size_t>(value)]; }
  ValueData allocate(ValueId value, bool zero) const;
  ValueData take(ValueId value);  // moves a value's memory out of the table, once nobody sends from it
  void release_if_used(ValueId value);
  bool being_sent(ValueId value) const;
  bool available(ValueId value) const;

  const Plan& plan_;
  const RankPlan& mine_;
  const Mesh& mesh_;
  const AttentionKernel& kernel_;
  std::vector<int> last_use_;
  std::vector<int> producer_;  // move step that makes each value, or -1
  std::vector<bool> travels_;  // values kept in one block of memory
  std::vector<ValueData> data_;
  std::vector<Transfer> transfers_;
  AttentionCall call_;
  int position_ = 0;  // the step being executed
};

}  // namespace dattn
