// The public entry: strided tensors, and arguments that do not fit its plan: refused on every rank, before anything is sent.
#include "parallel/attention.h"

#include <atomic>
#include <cstring>
#include <memory>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/base/philox.h"
#include "parallel/comm/decorators.h"
#include "parallel/comm/thread.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

using testing::HasSubstr;

std::unique_ptr<Communicator> everyone(Communicator& world, const std::shared_ptr<ByteCounter>& counter) {
  std::vector<int> all;
  for (int rank = 0; rank < world.size(); ++rank) all.push_back(rank);
  return counted(world.split(all, "attention"), counter);
}

Tensor numbers(const Shape& shape, std::uint64_t stream) {
  Tensor all = Tensor::uninitialized(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i)
    all.ptr<float>()[i] = philox_normal(3, stream, static_cast<std::uint64_t>(i));
  return all;
}

void expect_same_bits(const Tensor& got, const Tensor& want, const char* name) {
  ASSERT_EQ(got->shape, want->shape) << name;
  EXPECT_EQ(std::memcmp(got->data, want->data, static_cast<std::size_t>(want->bytes())), 0) << name;
}

// q and dout as [seq, batch, heads, dim], k and v side by side in one tensor and as [batch, heads, seq, dim].
TEST(ShardedAttention, StridedTensorsGiveTheBitsOfContiguousOnes) {
  for (const std::string strategy : {"ring", "ulysses", "allgather", "fetch", "tree", "invariant"}) {
    AttentionOptions options;
    options.strategy = strategy;
    options.layout = Layout::kStriped;
    run_thread_ranks(3, {.timeout_s = 30}, [&](Communicator& world) {
      const Mesh mesh(world, strategy == "ulysses" ? mesh_of(1, 1, 3, 1) : mesh_of(1, 3, 1, 1));
      ShardedAttention attention(mesh, {2, 46, 46, 6, 3, 8, 8, DType::kF32}, options);
      const std::int64_t rows = attention.q_positions().count();
      const auto stream = static_cast<std::uint64_t>(10 * world.rank());
      const Tensor queries = numbers({rows, 2, 6, 8}, stream), gradients = numbers({rows, 2, 6, 8}, stream + 1);
      const Tensor pairs = numbers({2, rows, 6, 8}, stream + 2), values = numbers({2, 3, rows, 8}, stream + 3);
      const TensorView q = queries->transpose(0, 1), dout = gradients->transpose(0, 1), k = pairs->slice(2, 3, 3),
                       v = values->transpose(1, 2);
      const Tensor plain_q = to_dtype(q, q.dtype), plain_k = to_dtype(k, k.dtype), plain_v = to_dtype(v, v.dtype),
                   plain_dout = to_dtype(dout, dout.dtype);
      const AttentionResult some = attention.forward(q, k, v), plain = attention.forward(plain_q, plain_k, plain_v);
      expect_same_bits(some.out, plain.out, "out");
      expect_same_bits(some.lse, plain.lse, "lse");
      const AttentionGradients back = attention.backward(q, k, v, some, dout),
                               plain_back = attention.backward(plain_q, plain_k, plain_v, plain, plain_dout);
      expect_same_bits(back.dq, plain_back.dq, "dq");
      expect_same_bits(back.dk, plain_back.dk, "dk");
      expect_same_bits(back.dv, plain_back.dv, "dv");
    });
  }
}

struct BadBias {
  std::string what;
  int axis = 0;  // whose size is one more; of heads and rows: of this rank's
  BiasShape planned = {true, true};
  DType dtype = DType::kF32;
  bool lacks = false;
};

std::vector<BadBias> bad_biases() {
  return {{"batch rows", 0},
          {"rows", 1},
          {"heads", 2},
          {"columns", 3},
          {"batch rows where one is planned", 0, {false, true}},
          {"heads where one is planned", 2, {true, false}},
          {"dtype", -1, {true, true}, DType::kBF16},
          {"fp64", -1, {false, false}, DType::kF64},
          {"none", -1, {true, true}, DType::kF32, true}};
}

TEST(ShardedAttention, ABiasThatDoesNotFitIsRefusedOnEveryRankBeforeAnythingIsSent) {
  for (const std::string strategy : {"ring", "hybrid", "grid", "tree"}) {
    const MeshShape shape_of_mesh = strategy == "hybrid" ? mesh_of(1, 2, 2, 1)
                                    : strategy == "grid" ? mesh_of(1, 2, 1, 1, 2)
                                                         : mesh_of(1, 4, 1, 1);
    for (const BadBias& bad : bad_biases()) {
      AttentionShape shape{2, 22, 19, 4, 2, 8, 8, DType::kF32};
      shape.bias = bad.planned;
      AttentionOptions options;
      options.strategy = strategy;
      options.mask = Mask::full();
      std::atomic<int> refused{0};
      run_thread_ranks(4, {.timeout_s = 30}, [&](Communicator& world) {
        const auto counter = std::make_shared<ByteCounter>();
        const auto counting = everyone(world, counter);
        const Mesh mesh(*counting, shape_of_mesh);
        ShardedAttention attention(mesh, shape, options);
        const std::int64_t rows = attention.q_positions().count(), keys = attention.kv_positions().count();
        const Interval heads = attention.heads().q, kv = attention.heads().kv;
        const Shape fits{bad.planned.per_batch ? 2 : 1, rows, bad.planned.per_head ? heads.count() : 1, shape.seq_kv};
        Shape wrong = fits;
        if (bad.axis >= 0) ++wrong[bad.axis];
        const Tensor q(DType::kF32, {2, rows, heads.count(), 8}), k(DType::kF32, {2, keys, kv.count(), 8});
        const Tensor bias(bad.dtype, wrong), good(DType::kF32, fits);
        const AttentionCall call{.bias = bad.lacks ? TensorView() : bias.view()};
        const auto refusal = [&](const auto& body) -> std::string {
          try {
            body();
          } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::kBadInput);
            return error.what();
          }
          return "accepted";
        };
        counter->reset();
        const std::string why = refusal([&] { attention.forward(q, k, k, call); });
        EXPECT_EQ(counter->total().sent + counter->total().received, 0) << bad.what;
        const AttentionResult result = attention.forward(q, k, k, {.bias = good});
        EXPECT_GT(counter->total().sent + counter->total().received, 0);
        counter->reset();
        const std::string why_not_back = refusal([&] { attention.backward(q, k, k, result, q, call); });
        EXPECT_EQ(counter->total().sent + counter->total().received, 0) << bad.what;
        for (const std::string& text : {why, why_not_back}) {
          EXPECT_THAT(text, HasSubstr("bias")) << bad.what;
          if (bad.axis >= 0) {
            EXPECT_THAT(text, HasSubstr(wrong.text())) << bad.what;
            EXPECT_THAT(text, HasSubstr(fits.text())) << bad.what;
          } else if (!bad.lacks) {
            EXPECT_THAT(text, HasSubstr(std::string(name_of(bad.dtype)))) << bad.what;
            EXPECT_THAT(text, HasSubstr("fp32")) << bad.what;
          }
        }
        ++refused;
      });
      EXPECT_EQ(refused, 4) << strategy << ": " << bad.what;
    }
  }
}

}  // namespace
}  // namespace dattn
