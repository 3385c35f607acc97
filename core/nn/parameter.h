// A learned tensor: its value and gradient on this part of the model, and what the rest of the job needs to know of it:
// which slice of the global tensor is held here, which elements this part answers for, and over whom its gradient is summed.
//
//   global k.weight [3 heads * D, M] over 2 parts of 9 query heads      held      owned
//     part 0: query heads 0..4, KV heads 0..1                          [0, 2D)   [0, 2D)
//     part 1: query heads 5..8, KV heads 1..2                          [D, 3D)   [2D, 3D)     (head 1 is held twice)
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/attention/positions.h"
#include "core/nn/hooks.h"
#include "core/tensor/tensor.h"

namespace dattn {

struct Parameter {
  std::string name;    // stable, e.g. "blocks.3.attention.q.weight"
  Tensor value;        // fp32; this part's slice
  Tensor gradient;     // fp32; same shape
  Tensor gradient2;    // fp32; of a second use (a tied token table), where the sums of the two must be kept apart until each
                       // is whole; else undefined
  Tensor rounded;      // value in the type of products, where one reads it and that is not fp32; the transformer's to keep true
  Shape global_shape;  // of the whole tensor, on every part
  int cut_axis = 0;    // the axis that is cut over the tensor axis; whole tensors hold all of axis 0
  Interval held;       // rows of cut_axis in `value`, numbered globally; may be empty, may overlap with other parts'
  Interval owned;      // the part of `held` this part answers for: over all parts, every element is owned once
  bool decays = false;  // weight decay applies: matrices, not norms and biases
  bool factor = false;  // a linear layer's weight: its gradient is a product, which may be written as well as added

  // A gradient is always summed over the replicas (data, ring, ulysses), which hold other tokens. Where this is set it
  // is also summed over the tensor axis: what is learned in the residual stream when its rows are cut (sequence
  // parallelism), and slices that overlap with another part's. The flag is the same on every part. Use whole_of() to
  // bring slices to a common shape first; elements that nobody else holds are unchanged by the sum with zeros.
  bool sum_over_tensor = false;

  std::int64_t elements() const { return value->elements(); }
  bool whole() const { return held.begin == 0 && held.end == global_shape[cut_axis]; }
};

// A stretch of a parameter's elements, in the order of their memory.
struct ParameterRun {
  Parameter* parameter = nullptr;
  Interval elements;

  // These elements of a contiguous tensor of the parameter's shape on this part.
  TensorView of(const TensorView& local) const {
    return local.reshape({local.elements()}).slice(0, elements.begin, elements.count());
  }
};
// Runs end to end in a flat tensor: body(run, its place).
template <class Body>
void for_each_place(std::span<const ParameterRun> runs, const TensorView& flat, const Body& body) {
  std::int64_t begin = 0;
  for (const ParameterRun& run : runs) {
    body(run, flat.slice(0, begin, run.elements.count()));
    begin += run.elements.count();
  }
}

std::vector<ParameterRun> whole_runs(std::span<Parameter* const> parameters);

// The window of a tensor of the parameter's global shape that this part holds; shares the memory.
TensorView held_of(const Parameter& parameter, const TensorView& global);
// The window of a tensor of this part's shape (value, gradient, optimizer state) that this part owns.
TensorView owned_of(const Parameter& parameter, const TensorView& local);
// A copy of this part's tensor placed in a global one that is zero elsewhere.
Tensor whole_of(const Parameter& parameter, const TensorView& local);

// How initial values are made: normal with a standard deviation, or one value everywhere.
struct Initial {
  enum class Kind { kNormal, kConstant };
  Kind kind = Kind::kNormal;
  double value = 0.02;  // standard deviation, or the constant
};

// Fills `value` from Philox keyed by (seed, hash of the name, global element index): equal on any partition.
void initialize(Parameter& parameter, const Initial& initial, std::uint64_t seed);

// FNV-1a, 64 bits: what a parameter's name becomes in the key of its initial values.
std::uint64_t hash_of(std::string_view text);

}  // namespace dattn
