#pragma once

#include "launch/commands/commands.h"

namespace dattn {

// dattn bench train CONFIG, a subcommand of `bench`: optimizer steps of the config's model on random tokens.
Command add_bench_train(CLI::App& bench);

}  // namespace dattn
