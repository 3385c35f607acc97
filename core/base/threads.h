// The threads of one rank. Loops run on OpenMP, which the matrix library uses too, so one pool serves both.
#pragma once

#include <cstdint>

namespace dattn {

// Threads that loops started from this thread use. Set once per rank: max(1, cores / local ranks) by default.
void set_num_threads(int threads);
int num_threads();
int available_cores();  // cores this process may run on

// Calls body(i) for every i in [0, count), spread over the rank's threads; body must not throw.
template <class Body>
void parallel_for(std::int64_t count, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) if (count > 1 && num_threads() > 1)
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace dattn
