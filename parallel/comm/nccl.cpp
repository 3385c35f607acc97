#include "parallel/comm/nccl.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <thread>
#include <unordered_map>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/device/cuda_module.h"
#include "parallel/comm/nccl_job.h"
#include "parallel/comm/parts.h"

namespace dattn {
namespace {

nccl::DataType nccl_type(DType type) {
  switch (type) {
    case DType::kF32: return nccl::kFloat32;
    case DType::kBF16: return nccl::kBfloat16;
    case DType::kF16: return nccl::kFloat16;
    case DType::kF64: return nccl::kFloat64;
    case DType::kI32: return nccl::kInt32;
  }
  return nccl::kInt8;
}

// What a rank tells a peer that it is about to do with it.
struct Call {
  std::array<char, 40> verb{};
  std::int32_t layer = -1;
  std::int32_t step = -1;
  std::uint64_t bytes = 0;

  Call() = default;
  Call(const OpLabel& label, std::size_t count) : layer(label.layer), step(label.step), bytes(count) {
    std::copy_n(label.verb.data(), std::min(label.verb.size(), verb.size() - 1), verb.data());
  }
  bool operator==(const Call&) const = default;
  std::string text() const { return fmt::format("{} bytes ({})", bytes, label_text({verb.data(), layer, step})); }
};

// The two sides of a transfer compare what they are about to do.
struct CallCheck {
  struct Awaited {
    int peer = 0;
    Call wanted, told;
  };
  std::vector<Call> mine;
  std::vector<Awaited> awaited;
  Communicator::Ticket ticket = 0;  // of the control communicator
};

bool equal(std::span<const std::int64_t> counts) {
  return std::all_of(counts.begin(), counts.end(), [&](std::int64_t count) { return count == counts[0] && count > 0; });
}

// NCCL's id through a file that all ranks see: written by rank 0, whole or not at all.
class IdFile {
 public:
  IdFile(std::string path, bool mine) : path_(std::move(path)), mine_(mine) {}
  ~IdFile() {
    std::error_code ignored;
    if (written_) std::filesystem::remove(path_, ignored);
  }
  IdFile(const IdFile&) = delete;
  IdFile& operator=(const IdFile&) = delete;

  bool named() const { return !path_.empty(); }
  void share(nccl::UniqueId& id, NcclJob& job) {
    if (!mine_) return read(id, job);
    require(!std::filesystem::exists(path_),
            "DATTN_NCCL_ID_FILE: {} exists, left by another job or used by one; remove it, or name another", path_);
    AtomicFile file(path_);
    file.write(std::as_bytes(std::span(id.internal)));
    file.commit();
    written_ = true;
  }

 private:
  void read(nccl::UniqueId& id, NcclJob& job) const {
    const auto begin = NcclClock::now();
    while (!std::filesystem::exists(path_)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      const std::lock_guard lock(job.mutex);
      job.check_running_locked();
      if (std::chrono::duration<double>(NcclClock::now() - begin).count() < job.options.timeout_s) continue;
      job.fail_locked(
          fmt::format("DATTN_NCCL_ID_FILE: {} was not written by rank 0 within {:.3g} s; do all ranks see its folder?", path_,
                      job.options.timeout_s));
    }
    const std::string text = read_file(path_, "NCCL's id");
    require(text.size() == sizeof id.internal, "DATTN_NCCL_ID_FILE: {} holds {} bytes, not an id of {}", path_, text.size(),
            sizeof id.internal);
    std::memcpy(id.internal, text.data(), text.size());
  }

  std::string path_;
  bool mine_;
  bool written_ = false;
};

class NcclCommunicator : public Communicator {
 public:
  // control: of the group; nullptr for the world, whose own one the job holds.
  NcclCommunicator(std::shared_ptr<NcclJob> job, std::shared_ptr<NcclGroup> group, std::unique_ptr<Communicator> control)
      : job_(std::move(job)), group_(std::move(group)), control_(std::move(control)) {}

  int rank() const override { return group_->rank; }
  int size() const override { return group_->size(); }
  std::string_view name() const override { return group_->name; }

  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override;
  void wait(Ticket ticket) override;
  std::unique_ptr<Communicator> split(std::span<const int> ranks, std::string_view name) override;
  std::unique_ptr<Communicator> partition(std::span<const int> ranks, std::string_view name) override;

  void abort(const std::string& reason) noexcept override { abort(reason, ErrorCode::kPeer); }
  void abort(const std::string& reason, ErrorCode code) noexcept override { control().abort(reason, code); }
  JobEnd job_end() const override { return control().job_end(); }
  void terminate_job(int exit_code) noexcept override { control().terminate_job(exit_code); }

  void all_reduce_sum(const TensorView& data, const OpLabel& label) override;
  void all_gather(const TensorView& all, std::span<const std::int64_t> counts, const OpLabel& label) override;
  void reduce_scatter_sum(const TensorView& all, std::span<const std::int64_t> counts, const TensorView& own,
                          const OpLabel& label) override;

  bool has_native(Collective call, const TensorView& data, std::span<const std::int64_t> counts) const override;

  void initialise();  // NCCL's communicator, by all ranks of the group at once

 protected:
  std::shared_ptr<NcclJob> job_;

 private:
  struct Running {
    std::shared_ptr<DeviceTransfer> transfer;  // or that of the control communicator
    Ticket control = 0;
    std::unique_ptr<CallCheck> check;
  };

  Communicator& control() const { return control_ ? *control_ : job_->control(); }
  std::unique_ptr<NcclCommunicator> part(std::span<const int> ranks, std::string_view name, const NcclGroup* parent);
  void share_id(nccl::UniqueId& id, IdFile& file);
  void check_device(const TensorView& data, const OpLabel& label) const;
  template <class Enqueue, class After>
  void run_native(const OpLabel& label, std::size_t bytes, const Enqueue& enqueue, const After& after);
  void register_memory(std::span<const SendPart> sends, std::span<const RecvPart> receives);
  nccl::Result enqueue(std::span<const SendPart> sends, std::span<const RecvPart> receives);
  std::unique_ptr<CallCheck> tell_calls(std::span<const SendPart> sends, std::span<const RecvPart> receives,
                                        const OpLabel& label);
  void compare_calls(const CallCheck& check);

  std::shared_ptr<NcclGroup> group_;
  std::unique_ptr<Communicator> control_;
  Ticket next_ticket_ = 1;
  std::unordered_map<Ticket, Running> running_;
};

Communicator::Ticket NcclCommunicator::start(std::span<const SendPart> sends, std::span<const RecvPart> receives,
                                             const OpLabel& label) {
  const Device device = check_parts(sends, receives, rank(), size(), label);
  if (!device.is_cuda()) {
    running_[next_ticket_].control = control().start(sends, receives, label);
    return next_ticket_++;
  }
  ensure(device == job_->device, "{}: memory of {} on a rank whose device is {}", label_text(label), to_text(device),
         to_text(job_->device));
  copy_own_part(sends, receives, rank());
  const auto transfer = std::make_shared<DeviceTransfer>(device, label);
  const auto note = [&](const auto& parts, bool sending) {
    for (const auto& one : parts) {
      if (one.peer == rank() || one.bytes == 0) continue;
      transfer->parts.push_back({group_->ranks[static_cast<std::size_t>(one.peer)], sending, one.bytes});
    }
  };
  note(receives, false);
  note(sends, true);
  Running& running = running_[next_ticket_];
  if (!transfer->parts.empty()) {
    if (job_->options.tuning.register_buffers) register_memory(sends, receives);
    if (job_->options.check_calls) running.check = tell_calls(sends, receives, label);
    job_->launch(
        *group_, transfer, [&] { return enqueue(sends, receives); }, [] {});
  }
  running.transfer = transfer;
  return next_ticket_++;
}

void NcclCommunicator::register_memory(std::span<const SendPart> sends, std::span<const RecvPart> receives) {
  const std::lock_guard lock(job_->mutex);
  job_->check_running_locked();
  const auto each = [&](const auto& parts) {
    for (const auto& one : parts) {
      if (one.peer != rank() && one.bytes > 0) group_->register_memory(one.data, one.bytes);
    }
  };
  each(sends);
  each(receives);
}

nccl::Result NcclCommunicator::enqueue(std::span<const SendPart> sends, std::span<const RecvPart> receives) {
  const nccl::Api& nccl = job_->nccl;
  const auto each = [&](const auto& parts, const auto& call) {
    for (const auto& one : parts) {
      if (one.peer == rank() || one.bytes == 0) continue;
      const nccl::Result result = call(one);
      if (result != nccl::kSuccess && result != nccl::kInProgress) return result;
    }
    return nccl::kSuccess;
  };
  const nccl::Result received = each(receives, [&](const RecvPart& one) {
    return nccl.recv(one.data, one.bytes, nccl::kInt8, one.peer, group_->comm, group_->stream.native());
  });
  if (received != nccl::kSuccess) return received;
  return each(sends, [&](const SendPart& one) {
    return nccl.send(one.data, one.bytes, nccl::kInt8, one.peer, group_->comm, group_->stream.native());
  });
}

void NcclCommunicator::wait(Ticket ticket) {
  const auto entry = running_.find(ticket);
  ensure(entry != running_.end(), "{}: ticket {} was never started or has been waited for", name(), ticket);
  const Running running = std::move(entry->second);
  running_.erase(entry);
  if (!running.transfer) return control().wait(running.control);
  if (running.check) compare_calls(*running.check);
  {
    const std::lock_guard lock(job_->mutex);
    job_->check_running_locked();
  }
  current_stream().wait(running.transfer->done);
}

std::unique_ptr<CallCheck> NcclCommunicator::tell_calls(std::span<const SendPart> sends, std::span<const RecvPart> receives,
                                                        const OpLabel& label) {
  auto check = std::make_unique<CallCheck>();
  check->mine.reserve(sends.size());
  check->awaited.reserve(receives.size());
  std::vector<SendPart> out;
  std::vector<RecvPart> in;
  for (const SendPart& one : sends) {
    if (one.peer == rank() || one.bytes == 0) continue;
    check->mine.emplace_back(label, one.bytes);
    out.push_back({one.peer, &check->mine.back(), sizeof(Call)});
  }
  for (const RecvPart& one : receives) {
    if (one.peer == rank() || one.bytes == 0) continue;
    check->awaited.push_back({one.peer, Call(label, one.bytes), {}});
    in.push_back({one.peer, &check->awaited.back().told, sizeof(Call)});
  }
  check->ticket = control().start(out, in, label);
  return check;
}

// When the host waits, not at the start: transfers of different groups may be started in another order on each rank.
void NcclCommunicator::compare_calls(const CallCheck& check) {
  control().wait(check.ticket);
  for (const auto& [peer, wanted, told] : check.awaited) {
    if (told == wanted) continue;
    const std::lock_guard lock(job_->mutex);
    job_->fail_locked(
        fmt::format("the ranks do not make the same calls: in group '{}' of {} rank {} awaits {}, but rank {} sends {}", name(),
                    size(), group_->ranks[static_cast<std::size_t>(rank())], wanted.text(),
                    group_->ranks[static_cast<std::size_t>(peer)], told.text()));
  }
}

std::unique_ptr<NcclCommunicator> NcclCommunicator::part(std::span<const int> ranks, std::string_view name,
                                                         const NcclGroup* parent) {
  const int place = check_split(ranks, rank(), size(), name);
  std::vector<int> members;
  for (const int r : ranks) members.push_back(group_->ranks[static_cast<std::size_t>(r)]);
  return std::make_unique<NcclCommunicator>(job_, job_->group(members, place, name, parent), control().split(ranks, name));
}

std::unique_ptr<Communicator> NcclCommunicator::split(std::span<const int> ranks, std::string_view name) {
  auto made = part(ranks, name, nullptr);
  if (made->size() > 1 && made->group_->comm == nullptr) made->initialise();
  return made;
}

std::unique_ptr<Communicator> NcclCommunicator::partition(std::span<const int> ranks, std::string_view name) {
  auto made = part(ranks, name, group_.get());
  NcclGroup& sub = *made->group_;
  if (sub.size() == 1 || sub.comm != nullptr) return made;
  job_->create(sub, "split", [&](nccl::Comm* comm, nccl::Config* config) {
    return job_->nccl.comm_split(group_->comm, ranks[0], sub.rank, comm, config);  // the lowest rank is the colour
  });
  job_->make_arena(sub);
  return made;
}

void NcclCommunicator::initialise() {
  nccl::UniqueId id{};
  IdFile file(group_->name == "world" ? job_->options.id_file : "", rank() == 0);
  share_id(id, file);
  job_->create(*group_, "join", [&](nccl::Comm* comm, nccl::Config* config) {
    return job_->nccl.comm_init_rank_config(comm, size(), id, rank(), config);
  });
  job_->make_arena(*group_);
}

void NcclCommunicator::share_id(nccl::UniqueId& id, IdFile& file) {
  if (rank() == 0) {
    const nccl::Result result = job_->nccl.get_unique_id(&id);
    if (result != nccl::kSuccess) fail(ErrorCode::kSystem, "ncclGetUniqueId: {}", group_->error_text(result));
  }
  if (file.named()) return file.share(id, *job_);
  control().broadcast(std::as_writable_bytes(std::span(id.internal)), 0, {.verb = "nccl_id"});
}

// NCCL's maximum is not among them: it does not say what it makes of a NaN, which must reach all ranks.
bool NcclCommunicator::has_native(Collective call, const TensorView& data, std::span<const std::int64_t> counts) const {
  if (!data.device.is_cuda() || size() == 1 || !data.contiguous() || data.elements() == 0) return false;
  if (call != Collective::kAllGather && (job_->options.ordered_sums || data.dtype == DType::kI32)) return false;
  return call == Collective::kAllReduceSum ||
         (std::cmp_equal(counts.size(), size()) && equal(counts) && counts[0] * size() == data.elements());
}

void NcclCommunicator::check_device(const TensorView& data, const OpLabel& label) const {
  ensure(data.device == job_->device, "{}: a tensor of {} on a rank whose device is {}", label_text(label),
         to_text(data.device), to_text(job_->device));
}

template <class Enqueue, class After>
void NcclCommunicator::run_native(const OpLabel& label, std::size_t bytes, const Enqueue& enqueue, const After& after) {
  const auto transfer = std::make_shared<DeviceTransfer>(job_->device, label);
  transfer->parts = {{-1, false, bytes}};
  job_->launch(*group_, transfer, enqueue, after);
  current_stream().wait(transfer->done);
}

void NcclCommunicator::all_reduce_sum(const TensorView& data, const OpLabel& label) {
  if (!has_native(Collective::kAllReduceSum, data, {})) return Communicator::all_reduce_sum(data, label);
  check_device(data, label);
  const auto call = [&] {
    return job_->nccl.all_reduce(data.data, data.data, static_cast<std::size_t>(data.elements()), nccl_type(data.dtype),
                                 nccl::kSum, group_->comm, group_->stream.native());
  };
  run_native(label, static_cast<std::size_t>(data.bytes()), call, [] {});
}

void NcclCommunicator::reduce_scatter_sum(const TensorView& all, std::span<const std::int64_t> counts, const TensorView& own,
                                          const OpLabel& label) {
  if (!has_native(Collective::kReduceScatterSum, all, counts)) return Communicator::reduce_scatter_sum(all, counts, own, label);
  check_device(all, label);
  ensure(own.elements() == counts[0] && own.contiguous() && own.dtype == all.dtype && own.device == all.device,
         "{}: the result is a contiguous tensor like a slot of what is summed", label_text(label));
  const auto call = [&] {
    return job_->nccl.reduce_scatter(all.data, own.data, static_cast<std::size_t>(counts[0]), nccl_type(all.dtype), nccl::kSum,
                                     group_->comm, group_->stream.native());
  };
  run_native(label, static_cast<std::size_t>(all.bytes()), call, [] {});
}

// Equal slots are gathered in place, or through symmetric memory where the group has some.
void NcclCommunicator::all_gather(const TensorView& all, std::span<const std::int64_t> counts, const OpLabel& label) {
  if (!has_native(Collective::kAllGather, all, counts)) return Communicator::all_gather(all, counts, label);
  check_device(all, label);
  const auto slot = static_cast<std::size_t>(counts[0] * size_of(all.dtype)), whole = slot * static_cast<std::size_t>(size());
  std::byte* own = all.ptr<std::byte>() + slot * static_cast<std::size_t>(rank());
  const bool symmetric = whole <= group_->arena_bytes;
  auto* into = symmetric ? static_cast<std::byte*>(group_->arena) : all.ptr<std::byte>();
  std::byte* own_into = into + slot * static_cast<std::size_t>(rank());
  const Stream& stream = group_->stream;
  const auto call = [&] {
    if (symmetric) cuda_module().copy_pinned(own_into, own, slot, stream.native());
    return job_->nccl.all_gather(own_into, into, static_cast<std::size_t>(counts[0]), nccl_type(all.dtype), group_->comm,
                                 stream.native());
  };
  const auto after = [&] {
    if (symmetric) cuda_module().copy_pinned(all.data, into, whole, stream.native());
  };
  run_native(label, whole, call, after);
}

// The world ends NCCL before the control communicator, which takes leave of the other ranks.
class NcclWorld final : public NcclCommunicator {
 public:
  using NcclCommunicator::NcclCommunicator;
  ~NcclWorld() override { job_->close(); }
};

// Takes a framework's communicator for the world.
void borrow(NcclJob& job, NcclGroup& group, nccl::Comm lent) {
  int ranks = 0, rank = -1;
  const bool told =
      job.nccl.comm_count(lent, &ranks) == nccl::kSuccess && job.nccl.comm_user_rank(lent, &rank) == nccl::kSuccess;
  require(told && ranks == group.size() && rank == group.rank,
          "the NCCL communicator that was lent has rank {} of {}, but this job's rank is {} of {}; lend one of the same ranks",
          rank, ranks, group.rank, group.size());
  const std::lock_guard lock(job.mutex);
  group.comm = lent;
  group.lent = true;
}

void require_version(const nccl::Api& api, bool asked, int least, const char* key) {
  require(!asked || api.version >= least, "comm.nccl.{} needs NCCL {}, but {} is {}; install a newer one, or leave the key out",
          key, nccl::version_text(least), api.path, nccl::version_text(api.version));
}

}  // namespace

NcclOptions NcclOptions::from_environment(double timeout_s) {
  NcclOptions options;
  options.timeout_s = timeout_s;
  const char* check = std::getenv("DATTN_COMM_CHECK");
  options.check_calls = check != nullptr && std::string_view(check) == "1";
  if (const char* file = std::getenv("DATTN_NCCL_ID_FILE")) options.id_file = file;
  return options;
}

std::unique_ptr<Communicator> nccl_world(std::unique_ptr<Communicator> control, const NcclOptions& options) {
  const Device device = current_device();
  require(device.is_cuda(), "NCCL joins CUDA devices, but this rank's device is {}; choose device=cuda", to_text(device));
  std::string report;
  const auto api = nccl::find_nccl(report);
  if (!api) {
    fail(ErrorCode::kSystem, "NCCL cannot be loaded: {}", report);
  }
  require_version(*api, options.tuning.zero_cta, nccl::kZeroCtaVersion, "zero_cta");
  require_version(*api, options.tuning.symmetric_bytes > 0, nccl::kSymmetricVersion, "symmetric_bytes");
  std::vector<int> all(static_cast<std::size_t>(control->size()));
  std::iota(all.begin(), all.end(), 0);
  const int rank = control->rank();
  const std::string name(control->name());
  const auto job = std::make_shared<NcclJob>(std::move(control), *api, device, options);
  const auto group = job->group(all, rank, name);
  auto world = std::make_unique<NcclWorld>(job, group, nullptr);
  if (options.lent != nullptr) {
    borrow(*job, *group, options.lent);
  } else if (group->size() > 1) {
    world->initialise();
  }
  return world;
}

}  // namespace dattn
