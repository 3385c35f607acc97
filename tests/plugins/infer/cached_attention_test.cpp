// Attention with a sharded cache, against attention over the whole sequence at once: the rows come in pieces (a prefill, then
// few at a time), the cache is spread over ring, ulysses and tensor, also where heads and blocks do not divide.
#include "plugins/infer/cached_attention.h"

#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/base/philox.h"
#include "core/nn/local_attention.h"
#include "parallel/comm/thread.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

constexpr std::int64_t kLength = 150, kHeads = 6, kKvHeads = 3, kDim = 8;

Tensor random_tensor(std::int64_t heads, std::uint64_t stream) {
  Tensor tensor(DType::kF32, {1, kLength, heads, kDim});
  for (std::int64_t i = 0; i < tensor->elements(); ++i)
    tensor.ptr<float>()[i] = 2 * philox_normal(1, stream, static_cast<std::uint64_t>(i));
  return tensor;
}

// The whole result, from the first of the kernels (reference) over all rows at once.
Tensor whole_attention(const TensorView& q, const TensorView& k, const TensorView& v, const Mask& mask) {
  Tensor out(DType::kF32, q.shape);
  Tensor lse(DType::kF32, {1, kHeads, kLength});
  const std::vector<Region> regions = compile(mask, kLength, kLength);
  const Positions all = Positions::range(0, kLength);
  reference_kernel().attend({.q = q,
                             .k = k,
                             .v = v,
                             .heads = {0, 0, kHeads / kKvHeads},
                             .tiles = make_tiles(regions, all, all),
                             .scale = 0.3,
                             .out = out,
                             .lse = lse});
  return out;
}

class Cache : public testing::TestWithParam<std::array<int, 4>> {};  // data, ring, ulysses, tensor

TEST_P(Cache, PiecesEqualTheWhole) {
  const MeshShape shape = mesh_of(GetParam());
  const Tensor q = random_tensor(kHeads, 0), k = random_tensor(kKvHeads, 1), v = random_tensor(kKvHeads, 2);
  for (const Mask& mask : {Mask::causal(), Mask::window(20, 0)}) {
    const Tensor expected = whole_attention(q, k, v, mask);
    run_thread_ranks(shape.ranks(), {}, [&](Communicator& world) {
      const Mesh mesh(world, shape);
      CachedAttention attention(
          mesh,
          {.layers = 2, .heads = kHeads, .kv_heads = kKvHeads, .dim = kDim, .scale = 0.3, .mask = mask, .window = kLength});
      const HeadRange heads = heads_of(kHeads, kKvHeads, shape.size(Axis::kTensor), mesh.coordinate(Axis::kTensor));
      std::int64_t begin = 0;
      for (const std::int64_t rows : {70, 1, 1, 3, 60, 1, 14}) {
        const auto piece = [&](const Tensor& tensor, Interval range) {
          return tensor->slice(1, begin, rows).slice(2, range.begin, range.count());
        };
        for (const int layer : {0, 1}) {
          const Tensor out = attention.forward({.layer = layer}, piece(q, heads.q), piece(k, heads.kv), piece(v, heads.kv));
          const TensorView want = piece(expected, heads.q);
          for (std::int64_t row = 0; row < rows; ++row) {
            for (std::int64_t head = 0; head < heads.q.count(); ++head) {
              for (std::int64_t i = 0; i < kDim; ++i) {
                ASSERT_NEAR(out->at<float>(0, row, head, i), want.at<float>(0, row, head, i), 2e-5)
                    << mask.text() << " position " << begin + row << " head " << heads.q.begin + head;
              }
            }
          }
        }
        begin += rows;
        EXPECT_EQ(attention.length(), begin);
      }
      EXPECT_THROW(
          attention.forward({}, q->slice(1, 0, 1).slice(2, 0, heads.q.count()), k->slice(1, 0, 1).slice(2, 0, heads.kv.count()),
                            v->slice(1, 0, 1).slice(2, 0, heads.kv.count())),
          Error)
          << "a position outside the window was taken";
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, Cache,
                         testing::Values(std::array{1, 1, 1, 1}, std::array{1, 2, 1, 1}, std::array{1, 3, 1, 1},
                                         std::array{1, 1, 2, 1}, std::array{1, 1, 4, 1}, std::array{1, 2, 2, 1},
                                         std::array{1, 2, 2, 2}, std::array{2, 1, 1, 4}, std::array{1, 8, 1, 1}));

}  // namespace
}  // namespace dattn
