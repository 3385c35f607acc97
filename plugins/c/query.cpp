// The planner's choice for a call that no rank runs yet.
#include <cstdlib>
#include <cstring>

#include "parallel/call_config.h"
#include "parallel/report.h"
#include "plugins/c/boundary.h"

namespace dattn::c {
namespace {

struct QueryConfig {
  ShapeConfig shape;
  MeshConfig mesh;
  AttentionConfig attention;
  std::optional<Layout> layout;
  std::string strategy = "auto";
  std::optional<Objective> objective;
  std::string machine;
  DType dtype = DType::kF32;
  std::optional<Determinism> determinism;
};

template <class V>
void describe(V& v, QueryConfig& c) {
  v("shape", c.shape, "sizes of the call");
  v("mesh", c.mesh, "{ranks: n}, or its axes");
  v("attention", c.attention, "the mask and the terms of the scores");
  v("layout", c.layout, "absent = the planner's");
  v("strategy", c.strategy, "auto, or the only one to consider");
  v("objective", c.objective, "bytes or time; absent = time where a machine is named");
  v("machine", c.machine, "machine file");
  v("dtype", c.dtype, "storage type");
  v("determinism", c.determinism, "off, repeatable, invariant");
}

std::string answer(const QueryConfig& config) {
  const AttentionShape shape = data_share(config, shape_of(config.shape, config.dtype)).shape;
  std::optional<Machine> machine;
  if (!config.machine.empty()) machine = load_machine(config.machine);
  const Choice choice = plan_attention(planner_request(config, shape, machine));
  Json json = to_json(choice);
  json["lower_bound_bytes"] = choice.lower_bound_bytes;
  json["ratio"] = choice.ratio;
  json["text"] = explain(choice);
  return json.dump();
}

}  // namespace
}  // namespace dattn::c

using namespace dattn::c;

dattn_status dattn_plan_query(const char* config, char** text) {
  return guarded([&] {
    require_pointer(config, "config");
    require_pointer(text, "text");
    const std::string said = answer(dattn::parse_config_as<QueryConfig>(config, "config"));
    char* copy = static_cast<char*>(std::malloc(said.size() + 1));
    if (copy == nullptr) throw std::bad_alloc();
    std::memcpy(copy, said.c_str(), said.size() + 1);
    *text = copy;
  });
}

void dattn_text_free(char* text) { std::free(text); }
