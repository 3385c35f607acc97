// The sweep on ranks as processes: run under mpirun. Arguments are the strategies to take, all without one. DATTN_SWEEP=full
// takes every combination. Prints every failure and, on rank 0, the number of cases.
#include <algorithm>
#include <string_view>

#include <fmt/format.h>

#include "core/base/error.h"
#include "launch/bootstrap.h"
#include "parallel/strategy.h"
#include "tests/conformance/sweep.h"

int main(int argc, char** argv) {
  using namespace dattn;
  return run_job({.devices = conformance::test_devices()}, [&](Communicator& world) {
    std::size_t cases = 0, failures = 0;
    for (const Strategy& strategy : strategies()) {
      const auto asked_for = [&](const char* name) { return strategy.name == std::string_view(name); };
      if (argc > 1 && std::none_of(argv + 1, argv + argc, asked_for)) continue;
      for (const conformance::Case& one :
           conformance::sweep(std::string(strategy.name), world.size(), conformance::full_sweep())) {
        ++cases;
        const std::string problems = conformance::run_case(one, world);
        for (const std::string& said : world.gather_strings(problems, {"conformance"})) {
          if (said.empty()) continue;
          ++failures;
          if (world.rank() == 0) fmt::print("{}", said);
        }
      }
    }
    if (world.rank() == 0) fmt::print("{} cases on {} processes, {} failures\n", cases, world.size(), failures);
    require(cases > 0, "none of the strategies named has a case on {} ranks", world.size());
    ensure(failures == 0, "{} failures in the conformance sweep", failures);
  });
}
