// What a runner needs to run a plan for its messages alone: inputs of zeros, and a kernel that computes nothing.
#pragma once

#include <vector>

#include "parallel/run.h"

namespace dattn {

struct PlanInputs {
  PlanInputs(const Plan& plan, const RankPlan& mine) {
    for (const ValueId value : plan.inputs) {
      const What what = plan.values[static_cast<std::size_t>(value)].what;
      const Block& block = mine.blocks[static_cast<std::size_t>(value)];
      std::vector<TensorView>& fields = views.emplace_back();
      for (const Field& field : fields_of(what, plan.problem->shape)) {
        const std::int64_t heads = block.heads_for(what).count();
        tensors.emplace_back(field.dtype, field_shape(field, plan.problem->shape.batch, block.rows.count(), heads));
        fields.push_back(tensors.back().view());
      }
    }
  }

  std::vector<Tensor> tensors;
  std::vector<std::vector<TensorView>> views;  // the fields of each input, as Runner::run takes them
};

class NoKernel : public AttentionKernel {
 public:
  std::string_view name() const override { return "none"; }
  Support supports(const AttendTraits&) const override { return {}; }
  void attend(const AttendArgs&) const override {}
  void attend_grad(const AttendGradArgs&) const override {}
};

}  // namespace dattn
