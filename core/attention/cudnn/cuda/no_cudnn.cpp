// Built where cuDNN's headers or those of its front end are missing.
#include "core/attention/cudnn/cuda/graph.h"

namespace dattn::cudnn {

std::string missing() {
  return "this build has no cuDNN: its headers or those of its front end were not found; run launch/setup.sh and build again";
}

std::string version() { return {}; }

Planned make_plan(const GraphProblem& /*problem*/, const Target& /*target*/) { return {nullptr, missing()}; }

}  // namespace dattn::cudnn
