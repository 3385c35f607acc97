// The dattn command. Exit codes: 0 done, 1 a defect of dattn, 2 bad input, 3 a peer failed or timed out, 4 the training
// diverged, 5 the operating system refused (disk full, no permission, out of memory).
#include <cstdio>
#include <exception>
#include <map>

#include <CLI/CLI.hpp>

#include "core/base/error.h"
#include "launch/commands/commands.h"

namespace {

constexpr const char* kFooter =
    "Exit codes: 0 done, 1 a defect of dattn, 2 bad input, 3 a peer failed or timed out, 4 the training diverged, 5 the "
    "system refused (disk, permission, memory).";

int run(int argc, char** argv) {
  CLI::App app("dattn: exact attention whose heads and sequence are spread over many devices");
  app.set_version_flag("--version", std::string("dattn ") + DATTN_VERSION);
  app.require_subcommand(1);
  app.footer(kFooter);
  const std::map<std::string, dattn::Command> commands{
      {"train", dattn::add_train(app)},          {"generate", dattn::add_generate(app)},
      {"attention", dattn::add_attention(app)},  {"plan", dattn::add_plan(app)},
      {"bench", dattn::add_bench(app)},          {"doctor", dattn::add_doctor(app)},
      {"mesh-ranks", dattn::add_mesh_ranks(app)}};
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : static_cast<int>(dattn::ErrorCode::kBadInput);
  }
  return commands.at(app.get_subcommands().front()->get_name())();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const dattn::Error& error) {
    std::fprintf(stderr, "dattn: error: %s\n", error.what());
    return error.exit_code();
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "dattn: error: out of memory; use more ranks or a smaller problem\n");
    return static_cast<int>(dattn::ErrorCode::kSystem);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dattn: internal error: %s\n", error.what());
    return static_cast<int>(dattn::ErrorCode::kInternal);
  }
}
