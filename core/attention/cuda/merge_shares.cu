// Flash-Decoding's second step (Dao et al., 2023): the states that blocks took of shares of a row's keys become one, in the
// order of the keys, by one warp a row.
#include <type_traits>

#include "core/attention/cuda/device_text.h"
#include "core/attention/cuda/launchers.h"
#include "core/device/cuda/loops.h"

namespace dattn::cuda {
namespace {

template <class Sum>
struct MergeRow {
  SharesParams p;

  __device__ void operator()(std::int64_t row, int lane) const {
    const int s = static_cast<int>(row % p.seq_q), h = static_cast<int>(row / p.seq_q % p.heads),
              b = static_cast<int>(row / p.seq_q / p.heads);
    const Sum none = static_cast<Sum>(minus_infinity()), log2e = static_cast<Sum>(1.44269504088896340736);
    Sum* const lse = element_of<Sum>(p.lse, b, h, s);
    const Sum* const lses = element_of<const Sum>(p.shares_lse, b, h, s);
    const Sum old = p.merge ? *lse : none;
    Sum top = old;
    for (int i = 0; i < p.count; ++i) top = lses[i * p.share_lse] > top ? lses[i * p.share_lse] : top;
    const Sum finite = top == none ? Sum(0) : top;  // (-inf) - (-inf) would be NaN
    const Sum keep = power_of_2((old - finite) * log2e);
    Sum sum = keep;
    for (int i = 0; i < p.count; ++i) sum += power_of_2((lses[i * p.share_lse] - finite) * log2e);
    Sum* const out = row_of<Sum>(p.out, b, s, h);
    const Sum* const outs = row_of<const Sum>(p.shares, b, s, h);
    for (int d = lane; d < p.out.dim; d += 32) {
      Sum value = keep == Sum(0) ? Sum(0) : keep * out[d];
      for (int i = 0; i < p.count; ++i)
        value += power_of_2((lses[i * p.share_lse] - finite) * log2e) * outs[i * p.share_out + d];
      out[d] = sum == Sum(0) ? Sum(0) : value / sum;
    }
    __syncwarp();  // all lanes have read it
    if (lane == 0) *lse = sum == Sum(0) ? none : finite + base_2_log(sum) / log2e;
  }
};

}  // namespace

void merge_shares(const SharesParams& params, cudaStream_t stream) {
  const std::int64_t rows = std::int64_t{params.batch} * params.seq_q * params.heads;
  if (params.fp64)
    for_each_row(rows, stream, MergeRow<double>{params});
  else
    for_each_row(rows, stream, MergeRow<float>{params});
}

}  // namespace dattn::cuda
