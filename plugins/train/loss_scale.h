// Dynamic loss scaling (Micikevicius et al., "Mixed precision training", 2018): gradients are computed times a scale, so that
// they stay inside the range of fp16, and taken back to size in fp32. A step whose gradients are not finite is left out and
// the scale falls; after `growth_interval` steps without that it rises. Scales are powers of two: they round nothing.
// Every rank sees the same norm of the summed gradients, so all decide alike and a run repeats bit by bit.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "core/base/dtype.h"
#include "core/config/config.h"

namespace dattn {

struct LossScaleConfig {
  double initial = 65536;
  double growth = 2;
  double backoff = 0.5;
  std::int64_t growth_interval = 2000;
};

template <class V>
void describe(V& v, LossScaleConfig& c) {
  v("initial", c.initial, "what gradients are multiplied by at first; a power of two");
  v("growth", c.growth, "what the scale rises by after growth_interval steps without an overflow; a power of two");
  v("backoff", c.backoff, "what the scale falls to where gradients overflow, and the step is skipped; a power of two");
  v("growth_interval", c.growth_interval, "steps without an overflow after which the scale rises");
}

void check(const LossScaleConfig& c, const ConfigCheck& at);

class LossScale {
 public:
  static constexpr double kLeast = 1, kMost = 0x1p40;

  // For types other than fp16 the scale is 1 for good.
  LossScale(const LossScaleConfig& config, DType compute) : config_(config), on_(compute == DType::kF16) {
    if (on_) scale_ = config.initial;
  }

  bool on() const { return on_; }
  double scale() const { return scale_; }
  std::int64_t skipped() const { return skipped_; }  // steps, since training began

  void step_taken();
  // False where the scale is the least already.
  bool step_skipped();

  // What a checkpoint keeps (keys "loss_scale.*"), and back. Nothing there: as at first.
  void save(std::map<std::string, std::string>& values) const;
  void restore(const std::map<std::string, std::string>& values);

 private:
  LossScaleConfig config_;
  bool on_;
  double scale_ = 1;
  std::int64_t taken_ = 0;  // steps since the scale last changed
  std::int64_t skipped_ = 0;
};

}  // namespace dattn
