// Meshes of tests.
#pragma once

#include <array>

#include "parallel/mesh.h"

namespace dattn {

inline MeshShape mesh_of(int data, int ring, int ulysses, int tensor, int rows = 1, int ring_outer = 1) {
  MeshShape mesh;
  mesh.set(Axis::kData, data);
  mesh.set(Axis::kRingOuter, ring_outer);
  mesh.set(Axis::kRing, ring);
  mesh.set(Axis::kRows, rows);
  mesh.set(Axis::kUlysses, ulysses);
  mesh.set(Axis::kTensor, tensor);
  return mesh;
}

// Sizes of data, ring, ulysses and tensor.
inline MeshShape mesh_of(const std::array<int, 4>& sizes) { return mesh_of(sizes[0], sizes[1], sizes[2], sizes[3]); }

}  // namespace dattn
