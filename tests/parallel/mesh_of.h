// Meshes of tests by their four everyday axes.
#pragma once

#include <array>

#include "parallel/mesh.h"

namespace dattn {

// Sizes of data, ring, ulysses and tensor.
inline MeshShape mesh_of(const std::array<int, 4>& sizes) {
  MeshShape mesh;
  mesh.set(Axis::kData, sizes[0]);
  mesh.set(Axis::kRing, sizes[1]);
  mesh.set(Axis::kUlysses, sizes[2]);
  mesh.set(Axis::kTensor, sizes[3]);
  return mesh;
}

}  // namespace dattn
