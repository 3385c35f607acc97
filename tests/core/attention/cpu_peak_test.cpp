// The measured ceilings: that they count what was done and are of some sensible size, not what they are.
#include <cmath>

#include "core/attention/cpu/drive.h"
#include "core/attention/cpu/peak.h"
#include "tests/core/attention/every_path.h"

namespace dattn::testing {
namespace {

class CpuPeak : public EveryPath {};
DATTN_ON_EVERY_PATH(CpuPeak);

TEST_P(CpuPeak, CountsWholeVectors) {
  for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16}) {
    const cpu::Ops& ops = cpu::ops_for(cpu::choose_path(), storage);
    const double round = ops.multiply_adds(1);
    EXPECT_EQ(std::fmod(round, 2 * 12), 0) << name_of(storage);
    EXPECT_EQ(ops.multiply_adds(1000), 1000 * round) << name_of(storage);
    const double peak = peak_flops(storage);
    EXPECT_TRUE(peak > 1e7 && peak < 1e15) << peak;
  }
}

TEST(CpuCeilings, AreOfSensibleSize) {
  const double bandwidth = read_bandwidth();
  EXPECT_TRUE(bandwidth > 1e7 && bandwidth < 1e14) << bandwidth;
  EXPECT_THROW(peak_flops(DType::kF64), Error);
}

}  // namespace
}  // namespace dattn::testing
