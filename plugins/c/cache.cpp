// Decoding with a cache that is spread over the mesh (plugins/infer/cached_attention.h), a sequence for each batch row.
#include "plugins/c/handles.h"
#include "plugins/c/options.h"
#include "plugins/c/tensor.h"
#include "plugins/infer/cached_attention.h"

namespace dattn::c {
namespace {

struct Cache {
  std::shared_ptr<MeshOnComm> mesh;
  int layers = 1;
  DType dtype = DType::kF32;
  HeadRange heads;  // of this rank's tensor part
  std::int64_t dim = 0;
  std::vector<CachedAttention> rows;  // of the batch
};

CachedAttention::Options cached_options(const dattn_cache_options& given) {
  const AttentionOptions attention = options_of(given.attention, given.max_seq, given.max_seq);
  require(attention.dropout == 0, "attention.dropout.p is {}; decoding has no dropout", attention.dropout);
  const std::int64_t kv_heads = given.kv_heads != 0 ? given.kv_heads : given.heads;
  require(
      given.layers >= 1 && given.heads >= 1 && kv_heads >= 1 && given.heads % kv_heads == 0 && given.dim >= 1 &&
          given.dim <= 256 && given.max_seq >= 1,
      "dattn_cache_options: layers {}, heads {}, kv_heads {}, dim {} and max_seq {} must be positive, kv_heads a divisor of "
      "heads, dim at most 256",
      given.layers, given.heads, kv_heads, given.dim, given.max_seq);
  return {.layers = given.layers,
          .heads = given.heads,
          .kv_heads = kv_heads,
          .dim = given.dim,
          .scale = attention.softmax_scale.value_or(0),
          .softcap = attention.softcap,
          .alibi_slopes = attention.alibi_slopes,
          .mask = attention.mask,
          .window = given.max_seq,
          .dtype = to_dtype(given.dtype, "dattn_cache_options.dtype")};
}

std::shared_ptr<Cache> make_cache(const std::shared_ptr<MeshOnComm>& mesh, const dattn_cache_options& given) {
  const CachedAttention::Options options = cached_options(given);
  require(given.batch >= 0, "dattn_cache_options.batch is {}; it must be positive", given.batch);
  const MeshShape& shape = mesh->mesh.shape();
  auto cache = std::make_shared<Cache>(
      Cache{mesh,
            options.layers,
            options.dtype,
            heads_of(options.heads, options.kv_heads, shape.size(Axis::kTensor), mesh->mesh.coordinate(Axis::kTensor)),
            options.dim,
            {}});
  for (std::int64_t row = 0; row < std::max<std::int64_t>(1, given.batch); ++row) {
    cache->rows.emplace_back(mesh->mesh, options);
  }
  return cache;
}

void check_cached(const Cache& cache, const TensorView& tensor, std::int64_t count, std::int64_t heads, std::string_view name) {
  const Shape expected{static_cast<std::int64_t>(cache.rows.size()), count, heads, cache.dim};
  require(tensor.shape == expected, "{} has shape {}; it must be {}", name, tensor.shape.text(), expected.text());
  require(tensor.dtype == cache.dtype, "{} is {} but the cache holds {}", name, name_of(tensor.dtype), name_of(cache.dtype));
  require(tensor.empty() || tensor.size(3) == 1 || tensor.stride(3) == 1, "the last axis of {} must be contiguous", name);
}

void attend(Cache& cache, int layer, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out) {
  require(layer >= 0 && layer < cache.layers, "layer is {}; the cache has {} layers, counted from 0", layer, cache.layers);
  const std::int64_t count = q.size(1);
  check_cached(cache, q, count, cache.heads.q.count(), "q");
  check_cached(cache, k, count, cache.heads.kv.count(), "k");
  check_cached(cache, v, count, cache.heads.kv.count(), "v");
  check_cached(cache, out, count, cache.heads.q.count(), "out");
  for (std::size_t row = 0; row < cache.rows.size(); ++row) {
    const auto of_row = [&](const TensorView& view) { return view.slice(0, static_cast<std::int64_t>(row), 1); };
    AttentionSite site{};
    site.layer = layer;
    copy(cache.rows[row].forward(site, of_row(q), of_row(k), of_row(v)), of_row(out));
  }
}

}  // namespace
}  // namespace dattn::c

using namespace dattn;
using namespace dattn::c;

struct dattn_cache {
  std::shared_ptr<Cache> held;
};

dattn_status dattn_cache_create(dattn_mesh* mesh, const dattn_cache_options* options, dattn_cache** cache) {
  return create(cache, "cache", [&] {
    require_pointer(mesh, "mesh");
    const RankScope scope(*mesh->held);
    return make_cache(mesh->held, read_struct(options, "dattn_cache_options"));
  });
}

void dattn_cache_destroy(dattn_cache* cache) { delete cache; }

dattn_status dattn_cache_attend(dattn_cache* cache, int32_t layer, const dattn_tensor* q, const dattn_tensor* k,
                                const dattn_tensor* v, const dattn_tensor* out, void* stream) {
  return guarded([&] {
    require_pointer(cache, "cache");
    collective(*cache->held->mesh->comm, [&] {
      const Device device = cache->held->mesh->device();
      const TensorView query = view_of(q, 4, device, "q"), key = view_of(k, 4, device, "k"), value = view_of(v, 4, device, "v");
      const TensorView result = view_of(out, 4, device, "out");
      const CallerStream caller(device, stream);
      attend(*cache->held, layer, query, key, value, result);
      caller.done();
    });
  });
}

int64_t dattn_cache_length(const dattn_cache* cache) { return cache == nullptr ? -1 : cache->held->rows[0].length(); }

int64_t dattn_cache_local_rows(const dattn_cache* cache) { return cache == nullptr ? -1 : cache->held->rows[0].cached_rows(); }

dattn_status dattn_cache_clear(dattn_cache* cache) {
  return guarded([&] {
    require_pointer(cache, "cache");
    for (CachedAttention& row : cache->held->rows) row.clear();
  });
}
