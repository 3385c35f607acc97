// Parameters shared out between the ranks that hold equal ones, so that each updates a part of them and keeps the optimizer's
// state of that part alone. Large parameters are cut into buckets each, which travel without a copy; small ones, end to end,
// are cut together; and each bucket into a slot for each part:
//
//   parameters      [embed ....................][q.weight][k.weight] .. [norm][bias][norm] ..
//   buckets         [---- 0 ----|----- 1 ------][-- 2 ---][-- 3 ---] .. [-------- 9 --------]
//   slots           [0|1 |2 |3  |0 |1  |2 |3   ]..                       equal in a bucket; its last ones may end short
//
// Gradients are summed bucket by bucket into the slots (reduce-scatter), new values gathered from them: together the bytes of
// an all-reduce. Sums are taken in rank order and buckets go in order, so runs repeat bit by bit.
// Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", 2020 (stage 1).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/nn/parameter.h"
#include "parallel/comm/communicator.h"

namespace dattn {

class ParameterShares {
 public:
  // Buckets of about `bucket_bytes`. The parameters must outlive this; their gradients may be exchanged for others of the same
  // shape.
  ParameterShares(std::span<Parameter* const> parameters, int parts, int part, std::int64_t bucket_bytes);

  int parts() const { return parts_; }
  // What a part, or this one, answers for: runs of a parameter side by side, ascending.
  std::vector<ParameterRun> of(int part) const;
  std::span<const ParameterRun> own() const { return own_; }

  // Collective over `group`, whose ranks are the parts. Fp32, contiguous.
  void sum_gradients(Communicator& group, const OpLabel& label) const;  // those of own() become sums over the ranks
  void gather_values(Communicator& group, const OpLabel& label) const;  // every rank has the values that each has of own()
  std::int64_t values_sent() const;                                     // bytes that a rank sends then

 private:
  struct Bucket {
    Interval elements;      // of all parameters, end to end
    std::int64_t slot = 0;  // elements of a slot
  };

  // exchange(all [parts * slot], counts, own slot) for each bucket: of the tensors themselves where it lies in one of them,
  // else of a copy. `sums`: all of a bucket goes in and own slot comes out; else own slot goes in and all of it comes out.
  template <class Exchange>
  void in_buckets(Tensor Parameter::*field, bool sums, const Exchange& exchange) const;
  void add_buckets(Interval elements, std::int64_t most);
  Interval slot_of(const Bucket& bucket, int part) const;
  std::vector<ParameterRun> runs_of(Interval elements) const;

  std::vector<Parameter*> parameters_;
  std::vector<std::int64_t> begins_;  // of each parameter, end to end; one more than parameters
  int parts_;
  int part_;
  std::vector<Bucket> buckets_;
  std::vector<ParameterRun> own_;
};

}  // namespace dattn
