#include "launch/commands/simulate.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "core/base/file.h"
#include "parallel/simulate.h"
#include "parallel/timeline.h"

namespace dattn {
namespace {

std::vector<AxisUse> together(std::vector<AxisUse> all, const std::vector<AxisUse>& more) {
  for (const AxisUse& use : more) {
    const auto same = std::find_if(all.begin(), all.end(), [&](const AxisUse& one) { return one.axis == use.axis; });
    if (same == all.end()) {
      all.push_back(use);
    } else {
      same->bytes += use.bytes;
      same->busiest_s += use.busiest_s;
      same->busiest_bytes += use.busiest_bytes;
    }
  }
  return all;
}

struct Times {
  double time_s = 0, flops = 0, compute_s = 0, exposed_mean_s = 0, exposed_max_s = 0;  // means over ranks but for the maximum
  double bytes_inside = 0, bytes_between = 0;
  std::int64_t peak_memory = 0;
  std::vector<AxisUse> axes;

  // The one after the other.
  Times operator+(const Times& next) const {
    return {time_s + next.time_s,
            flops + next.flops,
            compute_s + next.compute_s,
            exposed_mean_s + next.exposed_mean_s,
            exposed_max_s + next.exposed_max_s,
            bytes_inside + next.bytes_inside,
            bytes_between + next.bytes_between,
            std::max(peak_memory, next.peak_memory),
            together(axes, next.axes)};
  }
};

Times times_of(const Simulation& simulation) {
  const auto mean = [&](std::int64_t RankTimes::*member) {
    return static_cast<double>(simulation.sum(member)) / static_cast<double>(simulation.ranks.size());
  };
  return {simulation.time_s,
          simulation.mean(&RankTimes::flops),
          simulation.mean(&RankTimes::compute_s),
          simulation.mean(&RankTimes::exposed_s),
          simulation.most(&RankTimes::exposed_s),
          mean(&RankTimes::bytes_inside),
          mean(&RankTimes::bytes_between),
          simulation.most(&RankTimes::peak_memory),
          simulation.axes()};
}

Json to_json(const Times& times, const Machine& machine) {
  Json axes = Json::object();
  for (const AxisUse& use : times.axes)
    axes[std::string(name_of(use.axis))] = {
        {"bytes", std::llround(use.bytes)}, {"busiest_link_bytes", use.busiest_bytes}, {"busiest_link_s", use.busiest_s}};
  return {{"time_s", times.time_s},
          {"tflops_per_rank", times.time_s > 0 ? times.flops / times.time_s * 1e-12 : 0.0},
          {"compute_s", times.compute_s},
          {"exposed_s", times.exposed_mean_s},
          {"exposed_max_s", times.exposed_max_s},
          {"bytes_inside_node", std::llround(times.bytes_inside)},
          {"bytes_between_nodes", std::llround(times.bytes_between)},
          {"axes", std::move(axes)},
          {"peak_memory_bytes", times.peak_memory},
          {"fits_memory", times.peak_memory <= machine.memory_bytes}};
}

// A number with the prefix that suits it: "1.234 ms", "56.7 GB".
std::string scaled(double value, const char* unit) {
  constexpr std::pair<double, const char*> kPrefixes[]{{1e12, "T"}, {1e9, "G"},  {1e6, "M"},  {1e3, "k"},
                                                       {1, ""},     {1e-3, "m"}, {1e-6, "u"}, {1e-9, "n"}};
  if (value == 0) return fmt::format("0 {}", unit);
  for (const auto& [factor, prefix] : kPrefixes) {
    if (value >= factor) return fmt::format("{:.4g} {}{}", value / factor, prefix, unit);
  }
  return fmt::format("{:.3g} {}", value, unit);
}

}  // namespace

void SimulateOptions::declare(CLI::App& command) {
  CLI::Option* simulates = command.add_option(
      "--simulate", machine, "walk the plan on this machine (YAML, see configs/machines): time, exposed communication, memory");
  CLI::Option* draws =
      command.add_option("--timeline", timeline, "with --simulate: write PREFIX.json (Perfetto) and PREFIX.html")
          ->type_name("PREFIX")
          ->needs(simulates);
  command.add_option("--timeline-ranks", timeline_ranks, "ranks in the timeline, from 0 on")
      ->capture_default_str()
      ->check(CLI::PositiveNumber)
      ->needs(draws);
}

Json simulate_plans(const SimulateOptions& options, const Plan& forward, const Plan& gradient) {
  const Machine machine = load_machine(options.machine);
  const int drawn = options.timeline.empty() ? 0 : options.timeline_ranks;
  const Simulation forth = simulate(forward, machine, drawn), back = simulate(gradient, machine, drawn);
  const Times forth_times = times_of(forth), back_times = times_of(back);
  const int ranks = forward.problem->mesh.ranks();
  Json simulated{{"machine", machine.name},
                 {"ranks", ranks},
                 {"nodes", machine.node_of(ranks - 1) + 1},
                 {"memory_bytes", machine.memory_bytes},
                 {"forward", to_json(forth_times, machine)},
                 {"backward", to_json(back_times, machine)},
                 {"both", to_json(forth_times + back_times, machine)}};
  if (options.timeline.empty()) return simulated;
  const std::string title = fmt::format("{}, {}, mask {}, on {}", forward.strategy, forward.problem->mesh.text(),
                                        forward.problem->mask_text, machine.name);
  const std::vector<Phase> phases{{"forward", &forward, &forth}, {"backward", &gradient, &back}};
  const std::string trace = options.timeline + ".json", page = options.timeline + ".html";
  write_file(trace, timeline_json(phases));
  write_file(page, timeline_html(title, phases));
  simulated["timeline"] = {trace, page};
  return simulated;
}

void print_simulation(const Json& simulated, const Plan& forward) {
  const auto row = [&](const char* name, const auto& text) {
    print_line(fmt::format("{:<28} {:>16} {:>16} {:>16}", name, text(simulated["forward"]), text(simulated["backward"]),
                           text(simulated["both"])));
  };
  const auto quantity = [](const char* key, const char* unit) {
    return [=](const Json& phase) { return scaled(phase[key].get<double>(), unit); };
  };
  const auto share = [](const char* key) {
    return [=](const Json& phase) {
      const double whole = phase["time_s"].get<double>();
      return fmt::format("{:.1f} %", whole > 0 ? phase[key].get<double>() / whole * 100 : 0.0);
    };
  };
  const int ranks = simulated["ranks"].get<int>(), nodes = simulated["nodes"].get<int>();
  print_line(fmt::format("strategy {}, mesh {}, layout {}, mask {}", forward.strategy, forward.problem->mesh.text(),
                         name_of(forward.problem->layout), forward.problem->mask_text));
  print_line(fmt::format("simulated on {}: {} rank{} on {} node{}", simulated["machine"].get<std::string>(), ranks,
                         ranks == 1 ? "" : "s", nodes, nodes == 1 ? "" : "s"));
  print_line(fmt::format("{:<28} {:>16} {:>16} {:>16}", "", "forward", "backward", "both"));
  row("time", quantity("time_s", "s"));
  row("TFLOP/s per rank", [](const Json& phase) { return fmt::format("{:.4g}", phase["tflops_per_rank"].get<double>()); });
  row("computing, mean", share("compute_s"));
  row("exposed communication, mean", share("exposed_s"));
  row("exposed communication, mean", quantity("exposed_s", "s"));
  row("  most of any rank", quantity("exposed_max_s", "s"));
  row("received inside the node", quantity("bytes_inside_node", "B"));
  row("received from other nodes", quantity("bytes_between_nodes", "B"));
  for (const auto& [name, unused] : simulated["both"]["axes"].items()) {
    const auto of_axis = [&name = name](const Json& phase, const char* key) {
      return phase["axes"].contains(name) ? phase["axes"][name][key].get<double>() : 0.0;
    };
    row(fmt::format("received over {}", name).c_str(), [&](const Json& phase) { return scaled(of_axis(phase, "bytes"), "B"); });
    row("  its busiest link carries", [&](const Json& phase) { return scaled(of_axis(phase, "busiest_link_bytes"), "B"); });
    row("  and is held", [&](const Json& phase) {
      const double whole = phase["time_s"].get<double>();
      return fmt::format("{:.1f} %", whole > 0 ? of_axis(phase, "busiest_link_s") / whole * 100 : 0.0);
    });
  }
  row("peak memory", quantity("peak_memory_bytes", "B"));
  row(fmt::format("  of {}", scaled(simulated["memory_bytes"].get<double>(), "B")).c_str(),
      [](const Json& phase) { return std::string(phase["fits_memory"].get<bool>() ? "fits" : "does not fit"); });
  if (simulated.contains("timeline")) {
    for (const Json& file : simulated["timeline"]) print_line(fmt::format("wrote {}", file.get<std::string>()));
  }
}

}  // namespace dattn
