// Dynamic loss scaling (see loss_scale.h).
#include "plugins/train/loss_scale.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace dattn {
namespace {

bool power_of_two(double x) {
  int exponent = 0;
  return x > 0 && std::isfinite(x) && std::frexp(x, &exponent) == 0.5;
}

}  // namespace

void check(const LossScaleConfig& c, const ConfigCheck& at) {
  at.require("initial", power_of_two(c.initial) && c.initial >= LossScale::kLeast && c.initial <= LossScale::kMost,
             "must be a power of two from 1 to 2^40");
  at.require("growth", power_of_two(c.growth) && c.growth >= 1, "must be a power of two, at least 1");
  at.require("backoff", power_of_two(c.backoff) && c.backoff < 1, "must be a power of two below 1");
  at.require("growth_interval", c.growth_interval >= 1, "must be at least 1");
}

void LossScale::step_taken() {
  if (!on_ || ++taken_ < config_.growth_interval) return;
  taken_ = 0;
  scale_ = std::min(scale_ * config_.growth, kMost);
}

bool LossScale::step_skipped() {
  taken_ = 0;
  ++skipped_;
  if (scale_ <= kLeast) return false;
  scale_ = std::max(scale_ * config_.backoff, kLeast);
  return true;
}

void LossScale::save(std::map<std::string, std::string>& values) const {
  if (skipped_ > 0) values["loss_scale.skipped"] = std::to_string(skipped_);
  if (!on_) return;
  values["loss_scale.exponent"] = std::to_string(std::ilogb(scale_));
  values["loss_scale.taken"] = std::to_string(taken_);
}

void LossScale::restore(const std::map<std::string, std::string>& values) {
  const auto read = [&](const char* key, std::int64_t otherwise) -> std::int64_t {
    const auto found = values.find(key);
    return found == values.end() ? otherwise : std::strtoll(found->second.c_str(), nullptr, 10);
  };
  skipped_ = read("loss_scale.skipped", 0);  // counts for the optimizer, whatever the type is now
  if (!on_) return;
  taken_ = read("loss_scale.taken", 0);
  scale_ = std::ldexp(1.0, static_cast<int>(read("loss_scale.exponent", std::ilogb(config_.initial))));
}

}  // namespace dattn
