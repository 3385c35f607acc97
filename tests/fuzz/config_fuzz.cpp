// Any bytes as a config: refused with an Error or read; what is read can be written and reads back to the same text.
#include <cstdint>
#include <cstdlib>

#include "core/base/error.h"
#include "launch/run_config.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace dattn;
  const std::string text(reinterpret_cast<const char*>(data), size);
  std::string yaml;
  try {
    yaml = to_yaml(to_node(parse_config_as<RunConfig>(text, "fuzz.yaml")));
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kBadInput) std::abort();
  }
  if (!yaml.empty() && to_yaml(to_node(parse_config_as<RunConfig>(yaml, "again.yaml"))) != yaml) std::abort();
  try {  // and as an override
    ConfigNode root = parse_config("train: {steps: 3}", "base.yaml");
    apply_override(root, text);
    (void)read_config<RunConfig>(root);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kBadInput) std::abort();
  }
  return 0;
}
