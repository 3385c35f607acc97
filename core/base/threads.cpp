#include "core/base/threads.h"

#include <sched.h>

#include <algorithm>

#include <omp.h>

namespace dattn {

void set_num_threads(int threads) { omp_set_num_threads(std::max(1, threads)); }
int num_threads() { return omp_get_max_threads(); }

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

}  // namespace dattn
