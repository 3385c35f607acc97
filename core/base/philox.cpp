#include "core/base/philox.h"

#include <cmath>
#include <numbers>

namespace dattn {

float philox_normal(std::uint64_t key, std::uint64_t stream, std::uint64_t index) {
  const float u = 1.0f - philox_uniform(key, stream, 2 * index);  // (0, 1]: the logarithm is finite
  const float v = philox_uniform(key, stream, 2 * index + 1);
  return std::sqrt(-2.0f * std::log(u)) * std::cos(2.0f * std::numbers::pi_v<float> * v);
}

}  // namespace dattn
