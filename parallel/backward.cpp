// backward(plan): the gradient's plan, derived from the forward one.
//
// - The moves of q and kv are replayed (nothing moved or gathered is kept from the forward pass), and dout with its
//   statistics follows q.
// - Every attend becomes an attend_grad. The final lse makes their pieces additive, so any order will do: attends to
//   rotated and fetched values come first, in forward order, a rank's own block last.
// - Gradients of rotated values travel on with the rotation, collecting each rank's piece, and then go home in one hop:
//   kv and dkv need P-1 hops each, and the last one overlaps with the own block.
// - An invariant plan is not derived: it brings all keys to every query and all queries to every key.
// - Gradients of gathered or re-sharded values go back through the adjoint move, which sums.
#include <algorithm>
#include <map>

#include "core/base/error.h"
#include "parallel/plan.h"

namespace dattn {

class BackwardBuilder {
 public:
  explicit BackwardBuilder(const Plan& forward) : forward_(forward), builder_(forward.strategy, forward.problem) {
    grad_out_ = builder_.add_value(What::kGradOut, {Placing::Kind::kLike, builder_.q()});
    builder_.plan_.inputs.push_back(grad_out_);
    for (std::size_t i = 0; i < forward.steps.size(); ++i) {
      for (const ValueId value : forward.steps[i].out) producer_[value] = &forward.steps[i];
    }
  }

  Plan build() && {
    if (forward_.problem->invariant) return std::move(*this).build_invariant();
    collect_nodes();
    for (const Step* attend : attends_in_order()) emit_attend(*attend);
    Plan& plan = builder_.plan_;
    for (const ValueId root : forward_.inputs) {
      const Node& node = nodes_.at(root);
      ensure(node.pending == 0 && node.gradient != kNoValue, "backward of strategy {}: the gradient of {} is incomplete",
             forward_.strategy, forward_.value_name(root));
      plan.outputs.push_back(node.gradient);
    }
    return std::move(plan);
  }

 private:
  // A q or kv value of the forward plan.
  struct Node {
    ValueId replayed = kNoValue;  // its twin in the backward plan
    ValueId grad_out = kNoValue;  // dout moved like it (q side)
    ValueId gradient = kNoValue;  // accumulated so far
    bool gradient_moved = false;  // the gradient so far comes from a move: add to it, do not accumulate into it
    int pending = 0;              // contributions that have not come yet
    ValueId next = kNoValue;      // the value rotated on from this one
  };

  // Nothing is summed across ranks: dq where the query is, over all keys; dk and dv where the key is, over all queries.
  Plan build_invariant() && {
    const bool alone = forward_.problem->mesh.sequence_parts() == 1;
    const ValueId q = builder_.q(), kv = builder_.kv();
    const ValueId dq = builder_.add_value(What::kGradQuery, {Placing::Kind::kLike, q});
    const ValueId dkv = builder_.add_value(What::kGradKeyValue, {Placing::Kind::kLike, kv});
    builder_.add_step(Verb::kAttendGrad, {q, builder_.gather_sequence(kv), grad_out_, kNoValue, kNoValue},
                      {dq, alone ? dkv : kNoValue});
    if (!alone) {
      const ValueId queries = builder_.gather_sequence(q), grads = builder_.gather_sequence(grad_out_);
      builder_.add_step(Verb::kAttendGrad, {queries, kv, grads, kNoValue, kNoValue}, {kNoValue, dkv});
    }
    builder_.plan_.outputs = {dq, dkv};
    return std::move(builder_.plan_);
  }

  static bool is_operand(What what) { return what == What::kQuery || what == What::kKeyValue; }
  const Value& value(ValueId id) const { return forward_.values[static_cast<std::size_t>(id)]; }
  const Step* move_to(ValueId id) const {
    const auto found = producer_.find(id);
    return found == producer_.end() ? nullptr : found->second;
  }
  bool continues_rotation(const Step& step) const {
    const Step* before = move_to(step.in[0]);
    return step.verb == Verb::kRotate && before && before->verb == Verb::kRotate && before->axis == step.axis;
  }

  void collect_nodes() {
    nodes_[builder_.q()] = {builder_.q(), grad_out_};
    nodes_[builder_.kv()] = {builder_.kv()};
    for (const Step& step : forward_.steps) {
      if (step.verb == Verb::kAttend) {
        ++nodes_.at(step.in[0]).pending;
        ++nodes_.at(step.in[1]).pending;
      } else if (is_move(step.verb) && is_operand(value(step.in[0]).what)) {
        Node& node = nodes_[step.out[0]];
        if (continues_rotation(step)) {
          nodes_.at(step.in[0]).next = step.out[0];
          ++node.pending;  // what the gradient has collected so far arrives here
        } else {
          ++nodes_.at(step.in[0]).pending;  // its gradient comes back
        }
      }
    }
  }

  std::vector<const Step*> attends_in_order() const {
    std::vector<const Step*> attends;
    for (const Step& step : forward_.steps) {
      if (step.verb == Verb::kAttend) attends.push_back(&step);
    }
    const auto travelled = [this](ValueId id) {
      const Placing::Kind kind = value(id).placing.kind;
      return kind == Placing::Kind::kRotated || kind == Placing::Kind::kFetched;
    };
    const auto own = [&](const Step* step) { return !travelled(step->in[0]) && !travelled(step->in[1]); };
    std::stable_partition(attends.begin(), attends.end(), [&](const Step* step) { return !own(step); });
    return attends;
  }

  ValueId emit_move(const Step& step, ValueId from) {
    switch (step.verb) {
      case Verb::kRotate: return builder_.rotate(from, step.axis, step.shift);
      case Verb::kGather: return builder_.gather(from, step.axis);
      case Verb::kFetch: return builder_.fetch(from, replay(value(step.out[0]).placing.wanted).replayed, step.axis, step.shift);
      case Verb::kSeqToHead: return builder_.seq_to_head(from, step.axis);
      default: fail(ErrorCode::kInternal, "{} of an operand has no backward", name_of(step.verb));
    }
  }

  Node& replay(ValueId id) {
    Node& node = nodes_.at(id);
    if (node.replayed != kNoValue) return node;
    const Step& step = *move_to(id);
    const Node& from = replay(step.in[0]);
    node.replayed = emit_move(step, from.replayed);
    if (from.grad_out != kNoValue) node.grad_out = emit_move(step, from.grad_out);
    return node;
  }

  void emit_attend(const Step& attend) {
    Node& q = replay(attend.in[0]);
    Node& kv = replay(attend.in[1]);
    const ValueId dq_in = q.gradient_moved ? kNoValue : q.gradient, dkv_in = kv.gradient_moved ? kNoValue : kv.gradient;
    const ValueId dq = builder_.add_value(What::kGradQuery, {Placing::Kind::kLike, q.replayed});
    const ValueId dkv = builder_.add_value(What::kGradKeyValue, {Placing::Kind::kLike, kv.replayed});
    builder_.add_step(Verb::kAttendGrad, {q.replayed, kv.replayed, q.grad_out, dq_in, dkv_in}, {dq, dkv});
    contribute(attend.in[0], dq, dq_in != kNoValue, false);
    contribute(attend.in[1], dkv, dkv_in != kNoValue, false);
  }

  // One contribution to the gradient of a value has been emitted; `includes` says that it holds the earlier ones too.
  void contribute(ValueId id, ValueId gradient, bool includes, bool moved) {
    Node& node = nodes_.at(id);
    if (node.gradient == kNoValue || includes) {
      node.gradient = gradient;
      node.gradient_moved = moved;
    } else {
      const bool keep_new = node.gradient_moved;  // add in computed memory, never in memory that a move delivered
      const ValueId sum = builder_.add_value(builder_.plan_.values[static_cast<std::size_t>(gradient)].what,
                                             {Placing::Kind::kLike, node.replayed});
      builder_.add_step(Verb::kAdd, keep_new ? std::vector{gradient, node.gradient} : std::vector{node.gradient, gradient},
                        {sum});
      node.gradient = sum;
      node.gradient_moved = false;
    }
    if (--node.pending == 0) complete(id);
  }

  void complete(ValueId id) {
    const Node& node = nodes_.at(id);
    const Step* step = move_to(id);
    if (step == nullptr) return;  // an input: done
    if (step->verb == Verb::kRotate) {
      const Placing& placing = value(id).placing;
      if (node.next != kNoValue) {
        contribute(node.next, builder_.rotate(node.gradient, step->axis, move_to(node.next)->shift), false, true);
      } else {
        const int parts = builder_.size(step->axis);
        const int home = ((-placing.shift) % parts + parts) % parts;
        contribute(placing.base, home == 0 ? node.gradient : builder_.rotate(node.gradient, step->axis, home), false, true);
      }
      return;
    }
    const Verb adjoint = step->verb == Verb::kSeqToHead ? Verb::kHeadToSeq : Verb::kReduceScatter;
    const ValueId from = step->in[0];
    contribute(from, builder_.move(adjoint, node.gradient, step->axis, 0, {Placing::Kind::kLike, nodes_.at(from).replayed}),
               false, true);
  }

  const Plan& forward_;
  PlanBuilder builder_;
  ValueId grad_out_ = kNoValue;
  std::map<ValueId, const Step*> producer_;
  std::map<ValueId, Node> nodes_;
};

Plan backward(const Plan& forward) { return BackwardBuilder(forward).build(); }

}  // namespace dattn
