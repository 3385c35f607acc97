// Decoding through the C interface: prefill and single steps give the rows of one causal attention, on any mesh.
#include "tests/plugins/c/fixture.h"

namespace dattn::test {
namespace {

constexpr std::int64_t kBatch = 2, kSeq = 75, kHeads = 4, kKvHeads = 2, kDim = 8;

HostTensor rows(const HostTensor& whole, std::int64_t begin, std::int64_t count) {
  HostTensor part({whole.shape[0], count, whole.shape[2], whole.shape[3]});
  const std::int64_t row = whole.shape[2] * whole.shape[3];
  for (std::int64_t b = 0; b < whole.shape[0]; ++b) {
    std::copy_n(whole.values.begin() + (b * whole.shape[1] + begin) * row, count * row, part.values.begin() + b * count * row);
  }
  return part;
}

HostTensor whole_attention(dattn_context* context, const HostTensor& q, const HostTensor& k, const HostTensor& v) {
  CommHandle comm;
  MeshHandle mesh;
  PlanHandle plan;
  auto axes = sized<dattn_mesh_options>();
  auto options = sized<dattn_attention_options>();
  options.batch = kBatch, options.seq_q = kSeq, options.heads = kHeads, options.kv_heads = kKvHeads, options.dim_qk = kDim;
  options.dtype = kFp32;
  HostTensor out({kBatch, kSeq, kHeads, kDim});
  auto call = sized<dattn_forward>();
  call.q = &q, call.k = &k, call.v = &v, call.out = &out;
  EXPECT_EQ(dattn_comm_self(context, &comm), DATTN_OK);
  EXPECT_EQ(dattn_mesh_create(comm, &axes, &mesh), DATTN_OK);
  EXPECT_EQ(dattn_plan_create(mesh, &options, &plan), DATTN_OK) << dattn_last_error();
  EXPECT_EQ(dattn_attention_forward(plan, &call), DATTN_OK) << dattn_last_error();
  return out;
}

TEST(CCache, DecodesLikeOneCausalAttention) {
  ContextHandle context;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &context));
  const HostTensor q = HostTensor::random({kBatch, kSeq, kHeads, kDim}, 1);
  const HostTensor k = HostTensor::random({kBatch, kSeq, kKvHeads, kDim}, 2),
                   v = HostTensor::random({kBatch, kSeq, kKvHeads, kDim}, 3);
  const HostTensor expected = whole_attention(context, q, k, v);
  std::atomic<std::int64_t> held{0};
  on_threads(thread_ranks(context, 4), [&](dattn_comm* comm) {
    MeshHandle mesh;
    CacheHandle cache;
    auto axes = sized<dattn_mesh_options>();
    axes.ring = 2, axes.ulysses = 2;
    DATTN_OK_OR_FAIL(dattn_mesh_create(comm, &axes, &mesh));
    auto options = sized<dattn_cache_options>();
    options.batch = kBatch, options.layers = 1, options.heads = kHeads, options.kv_heads = kKvHeads, options.dim = kDim;
    options.max_seq = 100;
    options.dtype = kFp32;
    DATTN_OK_OR_FAIL(dattn_cache_create(mesh, &options, &cache));
    std::int64_t done = 0;
    for (const std::int64_t count : {70, 1, 1, 3}) {
      const HostTensor part_q = rows(q, done, count), part_k = rows(k, done, count), part_v = rows(v, done, count);
      HostTensor out({kBatch, count, kHeads, kDim});
      DATTN_OK_OR_FAIL(dattn_cache_attend(cache, 0, &part_q, &part_k, &part_v, &out, nullptr));
      EXPECT_LT(difference(out, rows(expected, done, count)), 2e-6);
      done += count;
      EXPECT_EQ(dattn_cache_length(cache), done);
    }
    held += dattn_cache_local_rows(cache);
    const HostTensor more({kBatch, 40, kHeads, kDim}), more_kv({kBatch, 40, kKvHeads, kDim});
    EXPECT_EQ(dattn_cache_attend(cache, 0, &more, &more_kv, &more_kv, &more, nullptr), DATTN_BAD_INPUT);  // 115 > max_seq
    EXPECT_EQ(dattn_cache_attend(cache, 1, &more, &more_kv, &more_kv, &more, nullptr), DATTN_BAD_INPUT);  // no such layer
    DATTN_OK_OR_FAIL(dattn_cache_clear(cache));
    EXPECT_EQ(dattn_cache_length(cache), 0);
  });
  EXPECT_EQ(held, 2 * kSeq);  // over the ring each position once; the two ulysses ranks hold different heads
}

}  // namespace
}  // namespace dattn::test
