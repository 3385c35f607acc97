// What a rank computes with and where, told to all others before they do: ranks that would not agree are refused on all of
// them.
#pragma once

#include <string>
#include <vector>

#include "parallel/comm/communicator.h"

namespace dattn {

struct RankPlace {
  std::string host, device;  // by which ranks that share a device are seen
  std::string version;       // of dattn
  // On a CUDA device, versions of what it computes with, empty where it has none or does not use it, and the device's name.
  std::string nccl, cudnn, runtime, driver, gpu;
  std::string cpu;       // else the instructions of attention,
  std::string products;  // and of matrix products, where the job has any
};

// Of the calling thread and its current device.
RankPlace place_of_rank(bool uses_nccl);

// Everybody's, by rank; all make the call. Throws Error(kBadInput) on all ranks alike where they differ in what their results
// or transfers depend on; rank 0 notes what else differs.
std::vector<RankPlace> gather_alike(Communicator& control, const RankPlace& mine);

// Throws Error(kBadInput) where ranks compute by different instructions, so that they cannot promise the bits of any mesh
// (determinism invariant).
void require_same_instructions(const std::vector<RankPlace>& places);

}  // namespace dattn
