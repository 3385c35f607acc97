// The folder of a run. Training afresh sets an older run of the same name aside; only --resume continues one.
//
//   RUN/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/, loss.png, sample.txt}
#pragma once

#include <string>

namespace dattn {

struct RunFolder {
  std::string path;
  std::string set_aside;  // where an older run of this name went; empty where there was none

  std::string config() const { return path + "/config.yaml"; }
  std::string metrics() const { return path + "/metrics.jsonl"; }
  std::string tensorboard() const { return path + "/tensorboard"; }
  std::string checkpoints() const { return path + "/checkpoints"; }
  std::string loss_picture() const { return path + "/loss.png"; }
  std::string sample() const { return path + "/sample.txt"; }
};

// Makes the folder (one rank calls). An older run goes to PATH.1, PATH.2, .. A folder with anything else in it is
// refused. Throws Error(kBadInput) or Error(kSystem).
RunFolder fresh_run_folder(const std::string& path);
RunFolder existing_run_folder(const std::string& path);  // for --resume and generate; throws where it is no run folder

}  // namespace dattn
