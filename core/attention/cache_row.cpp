#include "core/attention/cache_row.h"

#include "core/base/error.h"
#include "core/device/cuda_module.h"
#include "core/device/stream.h"

namespace dattn {

void store_row(const TensorView& row, std::int64_t at, const TensorView& cache) {
  ensure(row.dtype == cache.dtype && row.size(1) == 1 && at < cache.size(1), "row {} of a cache of {} rows, {} in {}", at,
         cache.size(1), name_of(row.dtype), name_of(cache.dtype));
  if (!on_cuda({&row, &cache})) return copy(row, cache.slice(1, at, 1));
  cuda_module().store_row(row, at, cache, current_stream().native());
}

}  // namespace dattn
