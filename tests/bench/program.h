// The main of a benchmark of one call.
#pragma once

#include <cstdio>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {

// Reads the program's options and runs body(); an error is told on stderr and is the exit code.
template <class Body>
int run_program(CLI::App& app, int argc, char** argv, const Body& body) {
  CLI11_PARSE(app, argc, argv);
  try {
    body();
  } catch (const Error& error) {
    fmt::print(stderr, "{}\n", error.what());
    return error.exit_code();
  }
  return 0;
}

}  // namespace dattn
