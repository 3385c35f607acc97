// Rows of key/value caches on the device (core/attention/cache_row.h).
#include "core/attention/cuda/launchers.h"
#include "core/attention/cuda/upload.h"
#include "core/device/cuda/runtime.h"
#include "core/device/cuda/step.h"

namespace dattn::cuda {

// In a step, whose calls have the same arguments every time, the row's number is read from the device's memory.
void store_row(const TensorView& row, std::int64_t at, const TensorView& cache, NativeStream stream) {
  if (!in_step()) return copy(row, cache.slice(1, at, 1), stream);
  const auto number = static_cast<std::int32_t>(at);
  Upload upload;
  const std::size_t place = upload.add<std::int32_t>(std::span(&number, 1));
  upload.send(stream);
  store_row(row, upload.at<std::int32_t>(place), cache, static_cast<cudaStream_t>(stream));
}

}  // namespace dattn::cuda
