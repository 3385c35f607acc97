// Rows of key/value caches, whose number is in device memory (see cache_row.cpp).
#include "core/attention/cuda/launchers.h"
#include "core/device/cuda/loops.h"

namespace dattn::cuda {
namespace {

template <class Word>
struct StoreRow {
  const Word* from;
  const std::int32_t* at;
  std::int64_t from_head, to_row, to_head, dim;
  Word* to;

  __device__ void operator()(std::int64_t i) const {  // i = (head, element)
    const std::int64_t head = i / dim, d = i % dim;
    to[*at * to_row + head * to_head + d] = from[head * from_head + d];
  }
};

template <class Word>
void store_words(const TensorView& row, const std::int32_t* at, const TensorView& cache, NativeStream stream) {
  for_each(
      row.elements(), stream,
      StoreRow<Word>{row.ptr<Word>(), at, row.stride(2), cache.stride(1), cache.stride(2), row.size(3), cache.ptr<Word>()});
}

}  // namespace

void store_row(const TensorView& row, const std::int32_t* at, const TensorView& cache, cudaStream_t stream) {
  switch (size_of(row.dtype)) {
    case 2: return store_words<std::uint16_t>(row, at, cache, stream);
    case 4: return store_words<std::uint32_t>(row, at, cache, stream);
    default: return store_words<std::uint64_t>(row, at, cache, stream);
  }
}

}  // namespace dattn::cuda
