// dattn generate RUN: continues a text with a trained model.
#include "plugins/infer/generate.h"

#include <cstdio>
#include <memory>

#include "core/base/error.h"
#include "launch/commands/planning.h"
#include "plugins/train/checkpoint.h"
#include "plugins/train/run_folder.h"

namespace dattn {

RunConfig run_folder_config(const std::string& path, const CommonOptions& common) {
  return load_config<RunConfig>(existing_run_folder(path).config(), common.set);
}

namespace {

// What the keys and values of a full context take, on all ranks of mesh.tensor, mesh.ring and mesh.ulysses together.
std::string cache_text(const RunConfig& config) {
  const ModelConfig model = resolve(config.model);
  const std::int64_t window = model.position == "learned" ? model.max_seq : config.train.seq_len;
  const std::int64_t bytes = 2 * model.layers * window * model.kv_heads * model.head_dim * size_of(config.dtype);
  return fmt::format("keys and values of {} positions take {} bytes, beside the weights", window, bytes);
}

}  // namespace

Command add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "continue a text with a model of a run folder");
  struct Options {
    CommonOptions common;
    std::string run, prompt;
    GenerateOptions generate;
  };
  const auto options = std::make_shared<Options>();
  GenerateOptions& generate_options = options->generate;
  command->add_option("run", options->run, "run folder, as `train` printed it")->required();
  command->add_option("--prompt", options->prompt, "the text to continue");
  command->add_option("--max-tokens", generate_options.max_tokens, "how many tokens to write")->capture_default_str();
  command->add_flag("--greedy", generate_options.sampling.greedy, "always the likeliest token");
  command->add_option("--temperature", generate_options.sampling.temperature, "softens (> 1) or sharpens (< 1) the choice")
      ->capture_default_str();
  command->add_option("--top-k", generate_options.sampling.top_k, "only the k likeliest tokens; 0 = all")
      ->capture_default_str();
  command->add_option("--top-p", generate_options.sampling.top_p, "only the likeliest tokens of this total probability")
      ->capture_default_str();
  command->add_option("--seed", generate_options.sampling.seed, "the same seed writes the same text on every mesh")
      ->capture_default_str();
  command->add_flag("!--no-graphs", generate_options.graphs,
                    "on a CUDA device, without CUDA graphs: each kernel is launched by itself");
  options->common.declare(*command, true);
  return [options] {
    const auto load = [&] {
      check(options->generate.sampling);
      return resolve_mesh(run_folder_config(options->run, options->common));
    };
    return run_with_config(options->common, load, [&](const RunConfig& config, Communicator& world) {
      const bool first = world.rank() == 0, streams = first && !options->common.json;
      const auto stream = [streams](const std::string& text) {
        if (!streams) return;
        std::fputs(text.c_str(), stdout);
        std::fflush(stdout);
      };
      stream(options->prompt);
      const GenerateResult result = [&] {
        try {
          return generate(world, config.mesh.shape(), options->run, options->prompt, options->generate, stream);
        } catch (const OutOfMemory& error) {
          throw OutOfMemory(
              fmt::format("{}; {}: more ranks on mesh.tensor share both, on mesh.ring and mesh.ulysses the former",
                          error.message(), cache_text(config)));
        }
      }();
      stream("\n");
      if (!first || streams) return;
      print_json({{"event", "done"},
                  {"prompt", options->prompt},
                  {"text", result.text},
                  {"tokens", result.tokens},
                  {"prefill_s", result.prefill_s},
                  {"tokens_per_s", result.tokens_per_s},
                  {"graph_launches", result.graph_launches}});
    });
  };
}

}  // namespace dattn
