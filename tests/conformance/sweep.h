// The conformance sweep: every strategy x layout x mask x mesh x heads x length x type, against the reference kernel
// on one device, with gradients. New strategies and kernels join it without an edit.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "launch/devices.h"
#include "parallel/attention.h"
#include "parallel/comm/communicator.h"

namespace dattn::conformance {

struct Case {
  std::string strategy;
  MeshShape mesh;
  Layout layout = Layout::kZigzag;
  std::string mask;  // a name of masks()
  AttentionShape shape;
  std::string terms;                                   // of the scores, by name
  std::shared_ptr<const AttentionOptions> drawn = {};  // in place of mask and terms, which then are a text that is its alone

  std::string problem_text() const;  // mask, sizes, terms: what the right answer depends on
  std::string text() const;
};

// The masks of the sweep, by name, for the sizes of a case.
Mask mask_named(const std::string& name, const AttentionShape& shape);

AttentionOptions options_of(const Case& one);

// Every case that a strategy accepts, on meshes of `ranks` ranks. full: all of strategy x mesh x layout x mask, other
// dimensions in turn; otherwise a choice in which every pair of values of two dimensions that can run occurs, but those of mesh
// and mask. Either way the head dims of models come along, some of them on a data axis.
std::vector<Case> sweep(const std::string& strategy, int ranks, bool full);

bool full_sweep();           // DATTN_SWEEP=full
std::uint64_t sweep_seed();  // of random calls: DATTN_SEED, or always the same

// Where the tests compute: DATTN_TEST_DEVICE=cpu (default) or cuda, which ranks share, at most DATTN_TEST_RANKS_PER_DEVICE (64)
// of a host one device; DATTN_TEST_TRANSFERS=auto, nccl or staged.
DeviceOptions test_devices();

// Runs one case on the ranks of `world` and returns what this rank found wrong, or an empty string.
std::string run_case(const Case& one, Communicator& world);

}  // namespace dattn::conformance
