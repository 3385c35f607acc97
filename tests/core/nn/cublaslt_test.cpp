// Which products cuBLASLt takes, and with which epilogues, as the tests' stand-in of it counts them (tests/standins/cublaslt).
// Their values are compared in cuda_nn_test.cpp.
#include <dlfcn.h>

#include <cstdlib>
#include <optional>

#include <gtest/gtest.h>

#include "core/nn/cuda/cublaslt_api.h"
#include "core/nn/matmul.h"
#include "tests/core/device/on_cuda.h"
#include "tests/core/nn/support.h"

namespace dattn::testing {
namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr int kNoEpilogue = 1, kBias = cublaslt::kEpilogueBias, kGelu = cublaslt::kEpilogueGeluAux;

class Cublaslt : public OnCuda {
 protected:
  void SetUp() override {
    OnCuda::SetUp();
    const char* path = std::getenv("DATTN_CUBLASLT");
    void* library = path != nullptr ? dlopen(path, RTLD_NOW) : nullptr;
    if (library != nullptr) products_ = reinterpret_cast<decltype(products_)>(dlsym(library, "cublasLtStandinProducts"));
    if (products_ == nullptr) GTEST_SKIP() << "DATTN_CUBLASLT names no stand-in of cuBLASLt";
    scope_.emplace(kCuda);
  }
  template <class Body>
  std::int64_t taken(int epilogue, const Body& body) const {
    const std::int64_t before = products_(epilogue);
    body();
    return products_(epilogue) - before;
  }
  static Tensor on_device(DType dtype, const Shape& shape) {
    Tensor made = [&] {
      const DeviceScope host(Device{});
      return random_tensor(dtype, shape, 1);
    }();
    return to_device(made, kCuda);
  }

 private:
  std::optional<DeviceScope> scope_;
  std::int64_t (*products_)(int epilogue) = nullptr;
};

TEST_F(Cublaslt, TakesABiasWhateverTheResultsType) {
  const Tensor bias = on_device(DType::kF32, {16});
  for (const DType type : kTypes) {
    for (const DType result : {type, DType::kF32}) {
      const Tensor a = on_device(type, {5, 24}), b = on_device(type, {24, 16}), c(result, {5, 16});
      EXPECT_EQ(taken(kNoEpilogue, [&] { matmul(a, b, c); }), 1) << name_of(type) << " into " << name_of(result);
      EXPECT_EQ(taken(kBias, [&] { matmul(a, b, c, {.bias = bias.ptr<float>()}); }), 1)
          << name_of(type) << " into " << name_of(result);
    }
  }
}

// What an algorithm was chosen for holds for the pointer to come, too.
TEST_F(Cublaslt, TakesABiasAtAnyPlace) {
  const Tensor a = on_device(DType::kF32, {5, 24}), b = on_device(DType::kF32, {24, 16}), c(DType::kF32, {5, 16});
  const Tensor bias = on_device(DType::kF32, {17});
  for (const int offset : {0, 1}) {
    EXPECT_EQ(taken(kBias, [&] { matmul(a, b, c, {.bias = bias.ptr<float>() + offset}); }), 1);
  }
}

TEST_F(Cublaslt, GeluIsPartOfTheProductWhereRowsAreMultiplesOf8) {
  for (const DType type : kTypes) {
    for (const std::int64_t width : {16, 12}) {
      const Tensor a = on_device(type, {5, 24}), b = on_device(type, {24, width}), bias = on_device(DType::kF32, {width});
      const Tensor c(type, {5, width}), before(type, {5, width});
      const int part = width == 16 ? kGelu : 0;
      EXPECT_EQ(taken(part | kBias, [&] { matmul(a, b, c, {.bias = bias.ptr<float>(), .before_gelu = &before.view()}); }), 1)
          << name_of(type) << ", " << width;
      EXPECT_EQ(taken(part != 0 ? part : kNoEpilogue, [&] { matmul(a, b, c, {.before_gelu = &before.view()}); }), 1)
          << name_of(type) << ", " << width;
    }
  }
}

double loss_of_gpt2(Device device) {
  const DeviceScope scope(device);
  LocalAttention attention(Mask::causal());
  Boundary boundary;
  VocabularyReduction vocabulary;
  TransformerOptions options;
  options.compute = DType::kBF16;
  Transformer model(small_model("gpt2"), options, attention, boundary, vocabulary);
  return model.loss(OwnedBatch(2, 5, 29).view);
}

TEST_F(Cublaslt, AllBiasesAndGelusOfAModelAreEpilogues) {
  const std::int64_t layers = small_model("gpt2").layers;
  double loss = 0;
  EXPECT_EQ(taken(kGelu | kBias, [&] { loss = loss_of_gpt2(kCuda); }), layers);
  EXPECT_EQ(taken(kBias, [&] { EXPECT_EQ(loss_of_gpt2(kCuda), loss); }), 3 * layers);  // q, k, v
  EXPECT_NEAR(loss, loss_of_gpt2({}), 1e-2);
}

}  // namespace
}  // namespace dattn::testing
