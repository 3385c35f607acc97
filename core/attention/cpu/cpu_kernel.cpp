// The cpu kernel: tiled online-softmax attention, forward and backward, over packed operands, with SIMD chosen at run
// time. fp32, bf16 and fp16 storage, fp32 accumulation. Files: ops.h (border), path_*.cpp (instruction sets), *_text.h (the
// kernels), forward.cpp, backward.cpp, decode.cpp (drivers), split_states.cpp (keys in parts).
#include "core/attention/check_args.h"
#include "core/attention/cpu/drive.h"
#include "core/attention/cpu/paths.h"
#include "core/base/error.h"

namespace dattn {
namespace {

constexpr std::int64_t kMaxDim = 256;

class CpuKernel final : public AttentionKernel {
 public:
  std::string_view name() const override { return "cpu"; }

  Support supports(const AttendTraits& traits) const override {
    if (traits.storage != DType::kF32 && !is_half(traits.storage)) {
      return {false, fmt::format("storage is {}; it takes fp32, bf16 and fp16", name_of(traits.storage))};
    }
    if (traits.dim_qk < 1 || traits.dim_qk > kMaxDim || traits.dim_v < 1 || traits.dim_v > kMaxDim) {
      return {false, fmt::format("dims are {} and {}; it takes 1 to {}", traits.dim_qk, traits.dim_v, kMaxDim)};
    }
    return {};
  }

  void attend(const AttendArgs& args) const override {
    check(args.q, args.v);
    check_args(args);
    cpu::attend(cpu::choose_path(), args);
  }

  void attend_grad(const AttendGradArgs& args) const override {
    check(args.q, args.v);
    check_args(args);
    cpu::attend_grad(cpu::choose_path(), args);
  }

 private:
  void check(const TensorView& q, const TensorView& v) const {
    const Support support = supports({q.dtype, q.size(3), v.size(3)});
    ensure(support.ok, "the cpu kernel was called where it refuses: {}", support.why);
  }
};

}  // namespace

const AttentionKernel& cpu_kernel() {
  static const CpuKernel kernel;
  return kernel;
}

}  // namespace dattn
