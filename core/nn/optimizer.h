// AdamW with decoupled weight decay (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), clipping by
// the global norm, and learning-rate schedules.
//
//   const double squares = squared_norm(runs);                           // then summed over the job
//   const double clip = clip_factor(std::sqrt(squares), max_norm);
//   optimizer.step(learning_rate(schedule, step), clip);
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/nn/parameter.h"

namespace dattn {

// Sum of the squares of the gradients over the elements of the runs that this part of the model owns, so that a sum over the
// tensor axis counts every element of the model once. Gradients must be reduced already. Fixed order, in fp64; a device is
// waited for once.
double squared_norm(std::span<const ParameterRun> runs);

// What gradients are multiplied by so that their norm is at most max_norm; 1 where max_norm <= 0 (no clipping).
double clip_factor(double norm, double max_norm);

struct Schedule {
  std::string kind = "cosine";  // cosine | linear | constant
  double peak = 3e-4;           // learning rate after the warm-up
  double floor = 0.0;           // learning rate at the end (cosine, linear)
  std::int64_t warmup = 0;      // steps of linear growth; more than `steps` is taken as `steps`
  std::int64_t steps = 1;       // of the whole run
};
void validate(const Schedule& schedule);                            // throws Error(kBadInput) for an unknown kind
double learning_rate(const Schedule& schedule, std::int64_t step);  // steps count from 0; the first is never 0

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.1;
};

class AdamW {
 public:
  // Of these runs, or of whole parameters, which must outlive the optimizer.
  AdamW(std::span<const ParameterRun> runs, const AdamWOptions& options);
  AdamW(std::span<Parameter* const> parameters, const AdamWOptions& options) : AdamW(whole_runs(parameters), options) {}

  // One update with gradients times gradient_scale (the clip factor). Gradients are left as they are.
  void step(double learning_rate, double gradient_scale = 1.0);

  // State for checkpoints, in the order of the runs.
  struct Moments {
    ParameterRun run;
    Tensor m;  // fp32 [elements of the run], mean of gradients
    Tensor v;  // the same, mean of squared gradients
  };
  std::span<Moments> moments() { return moments_; }
  std::int64_t steps_done() const { return steps_; }
  void set_steps_done(std::int64_t steps) { steps_ = steps; }

 private:
  std::vector<Moments> moments_;
  AdamWOptions options_;
  std::int64_t steps_ = 0;
};

}  // namespace dattn
