// Attention with a sharded key/value cache (see cached_attention.h).
#include "plugins/infer/cached_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/attention/block_list.h"
#include "core/attention/cache_row.h"
#include "core/attention/state.h"
#include "core/base/error.h"

namespace dattn {

CachedAttention::CachedAttention(const Mesh& mesh, const Options& options)
    : mesh_(mesh),
      options_(options),
      mask_(compile(options.mask, options.window, options.window)),
      tensor_heads_(
          heads_of(options.heads, options.kv_heads, mesh.shape().size(Axis::kTensor), mesh.coordinate(Axis::kTensor))),
      heads_(own_heads(mesh.coordinate(Axis::kUlysses))),
      layers_(static_cast<std::size_t>(options.layers)) {
  if (options_.scale == 0) options_.scale = 1.0 / std::sqrt(static_cast<double>(options.dim));
}

// Query heads of the tensor part are split evenly over ulysses, each share with the KV heads it reads.
HeadRange CachedAttention::own_heads(int ulysses_index) const {
  const std::int64_t group = options_.heads / options_.kv_heads;
  const Interval share = split_evenly(tensor_heads_.q.count(), mesh_.shape().size(Axis::kUlysses), ulysses_index);
  const Interval q{tensor_heads_.q.begin + share.begin, tensor_heads_.q.begin + share.end};
  if (q.count() == 0) return {q, {tensor_heads_.kv.begin, tensor_heads_.kv.begin}};
  return {q, {q.begin / group, (q.end - 1) / group + 1}};
}

void CachedAttention::clear() {
  for (Layer& layer : layers_) layer.rows = layer.length = 0;
}

// This ring rank's positions below `length`, in the order they were appended: every ring-th block.
Positions CachedAttention::own_positions(std::int64_t length) const {
  const std::int64_t ring = mesh_.shape().size(Axis::kRing);
  if (ring == 1) return Positions::range(0, length);
  std::vector<Run> runs;
  for (std::int64_t begin = mesh_.coordinate(Axis::kRing) * kBlock; begin < length; begin += ring * kBlock) {
    runs.push_back({begin, std::min(kBlock, length - begin), 1});
  }
  return Positions(runs);
}

void CachedAttention::grow(Layer& layer, std::int64_t rows) const {
  const std::int64_t capacity = layer.k.defined() ? layer.k->size(1) : 0;
  if (rows <= capacity) return;
  const Shape shape{1, std::max({rows, 2 * capacity, kBlock}), heads_.kv.count(), options_.dim};
  for (Tensor* cache : {&layer.k, &layer.v}) {
    Tensor larger(options_.dtype, shape);
    if (layer.rows > 0) copy(cache->view().slice(1, 0, layer.rows), larger->slice(1, 0, layer.rows));
    *cache = std::move(larger);
  }
}

void CachedAttention::append(Layer& layer, const TensorView& k, const TensorView& v) {
  const std::int64_t first = layer.length, count = k.size(1);
  const Positions held = own_positions(first + count);
  grow(layer, held.count());
  const std::int64_t head = heads_.kv.begin - tensor_heads_.kv.begin;
  for (std::size_t r = 0; r < held.runs().size(); ++r) {
    const Run& run = held.runs()[r];
    const std::int64_t begin = std::max(run.begin, first), rows = run.begin + run.count - begin;
    if (rows <= 0) continue;
    const std::int64_t row = held.row_of_run(r) + begin - run.begin;
    const auto store = [&](const TensorView& fresh, const Tensor& cache) {
      const TensorView own = fresh.slice(1, begin - first, rows).slice(2, head, heads_.kv.count());
      if (rows == 1) return store_row(own, row, cache);
      copy(own, cache->slice(1, row, rows));
    };
    store(k, layer.k);
    store(v, layer.v);
  }
  layer.rows = held.count();
  layer.length = first + count;
}

// On a device with the rows that are not filled yet, which no tile names: the same call for every token.
TensorView CachedAttention::held(const Tensor& cache, const Layer& layer) const {
  return cache->device.is_cuda() ? cache.view() : cache->slice(1, 0, layer.rows);
}

std::vector<std::int64_t> CachedAttention::next_token_key() {
  const std::int64_t next = length();
  const Positions held = own_positions(next + 1);
  for (Layer& layer : layers_) grow(layer, held.count());
  const std::vector<Tile> tiles = make_tiles(mask_, Positions::range(next, next + 1), held);
  const BlockList list = make_block_list(tiles, 1, 64, false);
  std::vector<std::int64_t> key{layers_.back().k->size(1), static_cast<std::int64_t>(tiles.size()),
                                static_cast<std::int64_t>(list.masks.size())};
  for (const BlockPiece& piece : list.pieces) key.insert(key.end(), {piece.begin, piece.end, piece.mask});
  return key;
}

Tensor CachedAttention::forward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v) {
  Layer& layer = layers_[static_cast<std::size_t>(site.layer)];
  const std::int64_t first = layer.length, count = q.size(1), heads = heads_.q.count();
  ensure(q.size(0) == 1, "the cache serves one sequence, got a batch of {}", q.size(0));
  require(first + count <= options_.window,
          "position {} lies outside the model's window of {} positions; clear the cache first", first + count - 1,
          options_.window);
  append(layer, k, v);

  const DType accumulator = accumulate_type(options_.dtype);
  Tensor out(accumulator, {1, count, heads, options_.dim});
  Tensor lse(accumulator, {1, heads, count});
  clear_state(out, lse);
  const std::vector<Tile> tiles = make_tiles(mask_, Positions::range(first, first + count), own_positions(layer.length));
  if (heads > 0 && !tiles.empty()) {
    select_kernel({options_.dtype, options_.dim, options_.dim, current_device()})
        .attend({.q = q.slice(2, heads_.q.begin - tensor_heads_.q.begin, heads),
                 .k = held(layer.k, layer),
                 .v = held(layer.v, layer),
                 .heads = {heads_.q.begin, heads_.kv.begin, options_.heads / options_.kv_heads},
                 .tiles = tiles,
                 .scale = options_.scale,
                 .out = out,
                 .lse = lse,
                 .terms = {.softcap = options_.softcap, .alibi_slopes = options_.alibi_slopes}});
  }
  return gather_heads(merge_over_ring(std::move(out), std::move(lse)), q.size(2));
}

// States of the same queries over different positions, from all ring ranks, merged in rank order.
Tensor CachedAttention::merge_over_ring(Tensor out, Tensor lse) const {
  Communicator& ring = mesh_.axis(Axis::kRing);
  if (ring.size() == 1 || out->elements() == 0) return out;
  const std::int64_t parts = ring.size(), self = ring.rank();
  Tensor outs = Tensor::uninitialized(out->dtype, {parts, out->size(1), out->size(2), out->size(3)});
  Tensor lses = Tensor::uninitialized(lse->dtype, {parts, lse->size(1), lse->size(2)});
  copy(out, outs->slice(0, self, 1));
  copy(lse, lses->slice(0, self, 1));
  ring.all_gather(outs, std::vector<std::int64_t>(static_cast<std::size_t>(parts), out->elements()), {.verb = "combine"});
  ring.all_gather(lses, std::vector<std::int64_t>(static_cast<std::size_t>(parts), lse->elements()), {.verb = "combine_stats"});
  clear_state(out, lse);
  for (std::int64_t part = 0; part < parts; ++part) merge_state(out, lse, outs->slice(0, part, 1), lses->slice(0, part, 1));
  return out;
}

// own [1, S, own heads, D] of every ulysses rank -> [1, S, heads of the tensor part, D] in the storage type.
Tensor CachedAttention::gather_heads(const TensorView& own, std::int64_t heads) const {
  Communicator& ulysses = mesh_.axis(Axis::kUlysses);
  const std::int64_t count = own.size(1), row = count * options_.dim;
  Tensor result = Tensor::uninitialized(options_.dtype, {1, count, heads, options_.dim});
  if (ulysses.size() == 1) {
    copy(own, result);
    return result;
  }
  Tensor all = Tensor::uninitialized(options_.dtype, {heads * row});  // one slot [S, heads, D] for each rank
  std::vector<std::int64_t> counts;
  for (int part = 0; part < ulysses.size(); ++part) counts.push_back(own_heads(part).q.count() * row);
  const auto slot = [&](int part) {
    const HeadRange range = own_heads(part);
    const std::int64_t begin = range.q.begin - tensor_heads_.q.begin;
    return all->slice(0, begin * row, range.q.count() * row).reshape({1, count, range.q.count(), options_.dim});
  };
  if (own.elements() > 0) copy(own, slot(ulysses.rank()));
  ulysses.all_gather(all, counts, {.verb = "head_to_seq"});
  for (int part = 0; part < ulysses.size(); ++part) {
    const HeadRange range = own_heads(part);
    if (range.q.count() > 0) copy(slot(part), result->slice(2, range.q.begin - tensor_heads_.q.begin, range.q.count()));
  }
  return result;
}

Attention::Gradients CachedAttention::backward(const AttentionSite&, const TensorView&, const TensorView&, const TensorView&,
                                               const TensorView&) {
  fail(ErrorCode::kInternal, "attention with a cache has no backward");
}

NextTokens::NextTokens(std::span<const std::int32_t> tokens, std::int64_t cached)
    : positions_(tokens.size()), targets_(tokens.size(), -1) {
  std::iota(positions_.begin(), positions_.end(), cached);
  batch_.batch = 1;
  batch_.tokens = tokens;
  batch_.targets = targets_;
  batch_.positions = positions_;
}

}  // namespace dattn
