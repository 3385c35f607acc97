#include "parallel/comm/mpi.h"

#include <dlfcn.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <future>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/library.h"
#include "parallel/comm/engine.h"
#include "parallel/comm/mpi_shim.h"

namespace dattn {
namespace {

constexpr std::chrono::seconds kLeaveWithin{10};
constexpr const char* kShimName = "libdattn_mpi.so";

struct Loaded {
  const DattnMpiTable* table = nullptr;
  std::string tried;
};

// RTLD_GLOBAL, because Open MPI's plugins look its symbols up in the global scope. Never unloaded: neither is MPI.
Loaded load_shim() {
  Loaded loaded;
  for (const std::string& path : library_candidates("DATTN_MPI_SHIM", kShimName)) {
    const LibraryEntry entry = find_entry(path, "dattn_mpi_table", RTLD_NOW | RTLD_GLOBAL);
    std::string why = entry.why;
    if (entry.address != nullptr) {
      loaded.table = reinterpret_cast<const DattnMpiTable* (*)()>(entry.address)();
      if (loaded.table->version == DATTN_MPI_SHIM_VERSION) return loaded;
      why = fmt::format("{} has version {}, not {}", path, loaded.table->version, DATTN_MPI_SHIM_VERSION);
      loaded.table = nullptr;
    }
    loaded.tried += (loaded.tried.empty() ? "" : "; ") + why;
  }
  return loaded;
}

class MpiTransport final : public Transport {
 public:
  MpiTransport(const DattnMpiTable& mpi, const void* host_comm) : mpi_(mpi) {
    std::array<char, 512> error{};
    if (mpi.join(host_comm, &rank_, &size_, &max_tag_, error.data(), error.size()) != 0)
      fail(ErrorCode::kSystem, "{}", error.data());
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::uint32_t tags() const override { return static_cast<std::uint32_t>(max_tag_); }
  // Far below MPI's limit of 2 GiB: each piece that arrives is a sign of life on a slow link.
  std::size_t max_piece() const override { return std::size_t{64} << 20; }

  void send(int peer, std::uint32_t tag, const void* data, std::size_t bytes, std::uint64_t cookie) override {
    check(mpi_.send(peer, static_cast<int>(tag), data, bytes, cookie), "MPI_Isend", peer, bytes);
  }
  void receive(int peer, std::uint32_t tag, void* data, std::size_t bytes, std::uint64_t cookie) override {
    check(mpi_.receive(peer, static_cast<int>(tag), data, bytes, cookie), "MPI_Irecv", peer, bytes);
  }
  void send_control(int peer, std::string_view message) noexcept override {
    mpi_.send_control(peer, message.data(), message.size());
  }
  void poll(Events& events) override {
    const DattnMpiDone* done = nullptr;
    const int count = mpi_.poll(&done);
    for (int i = 0; i < count; ++i) {
      events.completions.push_back(
          {done[i].cookie, done[i].bytes, done[i].error == 1, done[i].error == 2 ? done[i].text : std::string()});
    }
    std::array<char, kControlBytes> text;
    int peer = 0;
    while (const std::size_t bytes = mpi_.receive_control(&peer, text.data(), text.size())) {
      events.controls.push_back({peer, {text.data(), bytes}});
    }
  }
  void cancel() noexcept override { mpi_.cancel_receives(); }
  // All ranks have just met in a barrier. Should one die before MPI's own end, which knows no deadline, the process ends.
  void shutdown(bool clean) noexcept override {
    std::promise<void> left;
    std::thread watch([done = left.get_future()] {
      if (done.wait_for(kLeaveWithin) != std::future_status::ready) ::_exit(static_cast<int>(ErrorCode::kPeer));
    });
    mpi_.leave(clean ? 1 : 0);
    left.set_value();
    watch.join();
  }
  // MPI_Abort tells the launcher, which ends every process of the job: SIGTERM, and SIGKILL for those that are stopped.
  void kill_job(int exit_code) noexcept override {
    mpi_.kill_job(exit_code);
    ::_exit(exit_code);
  }

 private:
  static void check(int error, const char* call, int peer, std::size_t bytes) {
    if (error != 0) fail(ErrorCode::kPeer, "{} with rank {} of {} bytes failed with MPI error {}", call, peer, bytes, error);
  }

  const DattnMpiTable& mpi_;
  int rank_ = 0;
  int size_ = 1;
  int max_tag_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> mpi_world(const CommOptions& options, const void* host_comm) {
  const Loaded loaded = load_shim();
  if (!loaded.table) {
    fail(ErrorCode::kSystem,
         "this is an MPI job but MPI's shim {} cannot be loaded ({}); build with MPI installed, or set DATTN_MPI_SHIM to its "
         "path",
         kShimName, loaded.tried);
  }
  return engine_world(std::make_unique<MpiTransport>(*loaded.table, host_comm), options);
}

ShimReport probe_mpi() {
  const Loaded loaded = load_shim();
  if (!loaded.table) return {false, loaded.tried};
  std::string version = loaded.table->library_version();
  return {true, version.substr(0, version.find('\n'))};
}

}  // namespace dattn
