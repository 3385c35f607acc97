#include "plugins/jax/gang.h"

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <unordered_map>

namespace dattn::jax {
namespace {

constexpr std::size_t kMostPlans = 64;  // kept by a rank

void destroy(dattn_context* context) { dattn_context_destroy(context); }
void destroy(dattn_comm* comm) { dattn_comm_destroy(comm); }
void destroy(dattn_mesh* mesh) { dattn_mesh_destroy(mesh); }

template <class Handle>
struct Destroy {
  void operator()(Handle* handle) const { destroy(handle); }
};

// Waits without end go on from one hour to the next: condition_variable::wait() of GCC 12 is a new symbol (GLIBCXX_3.4.30),
// with which a wheel would need a newer libstdc++ than libdattn.so does.
constexpr std::chrono::hours kLong{1};

template <class Ready>
void wait_until(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, const Ready& ready) {
  while (!ready()) changed.wait_for(lock, kLong);
}

// Threads without end and without owner: XLA may still be at work while the process exits.
class IdleThreads {
 public:
  void run(std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    if (tasks_.size() > idle_) std::thread([this] { loop(); }).detach();
    wake_.notify_one();
  }

 private:
  void loop() {
    std::unique_lock lock(mutex_);
    while (true) {
      ++idle_;
      wait_until(wake_, lock, [this] { return !tasks_.empty(); });
      --idle_;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::size_t idle_ = 0;
};

void finish(const CallRequest& request, Outcome outcome) {
  run_soon([done = request.done, outcome = std::move(outcome)]() mutable { done(std::move(outcome)); });
}

// All gangs of the process; never destroyed, as above.
struct Gangs {
  std::mutex mutex;
  std::map<GangKey, std::shared_ptr<Gang>> by_key;
};

Gangs& gangs() {
  static auto* all = new Gangs;
  return *all;
}

std::shared_ptr<Gang> gang_for(const GangKey& key, dattn_device device) {
  const std::lock_guard lock(gangs().mutex);
  std::shared_ptr<Gang>& gang = gangs().by_key[key];
  if (gang == nullptr) {
    gang = std::make_shared<Gang>(key, device);
    gang->start();
  }
  return gang;
}

void forget(const Gang* gang) {
  const std::lock_guard lock(gangs().mutex);
  const auto found = gangs().by_key.find(gang->key());
  if (found != gangs().by_key.end() && found->second.get() == gang) gangs().by_key.erase(found);
}

void require_ok(dattn_status status) {
  if (status != DATTN_OK) throw std::runtime_error(dattn_last_error());
}

}  // namespace

void run_soon(std::function<void()> task) {
  static auto* threads = new IdleThreads;
  threads->run(std::move(task));
}

void submit(CallRequest request) {
  const CallSite& site = *request.site;
  const GangKey key{site.ranks, request.group, request.device.type, site.threads, site.timeout_s};
  try {
    while (!gang_for(key, request.device)->submit(request)) {
    }
  } catch (const std::exception& error) {
    finish(request, {DATTN_SYSTEM, error.what()});
  }
}

bool GangKey::operator<(const GangKey& other) const {
  const auto members = [](const GangKey& key) {
    return std::tie(key.ranks, key.group, key.device_type, key.threads, key.timeout_s);
  };
  return members(*this) < members(other);
}

// What one rank has made on the devices that its gang once had, used by the rank's thread alone.
struct Gang::Handles {
  dattn_comm* comm;
  std::unique_ptr<dattn_comm, Destroy<dattn_comm>> owner;  // of comm, unless it is the gang's
  std::vector<std::pair<dattn_mesh_options, std::unique_ptr<dattn_mesh, Destroy<dattn_mesh>>>> meshes = {};
  std::unordered_map<std::string, PlannedCall> plans = {};
  std::deque<std::string> order = {};  // of the plans, oldest first

  explicit Handles(dattn_comm* lent) : comm(lent) {}
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles() {
    for (const auto& [key, planned] : plans) dattn_plan_destroy(planned.plan);
  }

  // Device tensors travel by NCCL, on the rank's own device; the threads' communicator carries the rest. Collective.
  Outcome move_to(dattn_device device, double timeout_s) {
    dattn_context* context = nullptr;
    const dattn_context_options context_options{sizeof context_options, device, 0};
    if (Outcome made = outcome_of(dattn_context_create(&context_options, &context)); made.status != DATTN_OK) return made;
    const std::unique_ptr<dattn_context, Destroy<dattn_context>> context_owner(context);
    const dattn_comm_options options{sizeof options, timeout_s};
    Outcome made = outcome_of(dattn_comm_nccl(context, comm, nullptr, &options, &comm));
    if (made.status == DATTN_OK) owner.reset(comm);
    return made;
  }

  Outcome mesh_for(const dattn_mesh_options& wanted, dattn_mesh*& mesh) {
    const auto sizes = [](const dattn_mesh_options& options) {
      return std::tie(options.data, options.ring_outer, options.ring, options.rows, options.ulysses, options.tensor);
    };
    for (const auto& [options, known] : meshes) {
      if (sizes(options) == sizes(wanted)) return mesh = known.get(), Outcome{};
    }
    Outcome made = outcome_of(dattn_mesh_create(comm, &wanted, &mesh));
    if (made.status == DATTN_OK) meshes.emplace_back(wanted, mesh);
    return made;
  }

  Outcome plan_for(const CallRequest& request, const PlannedCall*& planned) {
    std::string key = plan_key(request);
    if (const auto known = plans.find(key); known != plans.end()) return planned = &known->second, Outcome{};
    dattn_mesh* mesh = nullptr;
    if (Outcome found = mesh_for(request.site->mesh, mesh); found.status != DATTN_OK) return found;
    PlannedCall made;
    if (Outcome outcome = make_plan(mesh, request, made); outcome.status != DATTN_OK) return outcome;
    if (order.size() >= kMostPlans) {
      dattn_plan_destroy(plans.at(order.front()).plan);
      plans.erase(order.front());
      order.pop_front();
    }
    order.push_back(key);
    planned = &plans.emplace(std::move(key), made).first->second;
    return {};
  }
};

// The gang's communicators are those of cpu ranks; of one CUDA device, its own.
Gang::Gang(GangKey key, dattn_device device) : key_(key), comms_(static_cast<std::size_t>(key.ranks)), queues_(comms_.size()) {
  const dattn_device cpu{DATTN_CPU, 0};
  const dattn_context_options context_options{sizeof context_options, key.ranks == 1 ? device : cpu,
                                              device.type == DATTN_CPU ? key.threads : 0};
  dattn_context* context = nullptr;
  require_ok(dattn_context_create(&context_options, &context));
  const std::unique_ptr<dattn_context, Destroy<dattn_context>> owner(context);
  const dattn_comm_options options{sizeof options, key.timeout_s};
  require_ok(key.ranks == 1 ? dattn_comm_self(context, comms_.data())
                            : dattn_comm_threads(context, key.ranks, &options, comms_.data()));
}

Gang::~Gang() {
  for (dattn_comm* comm : comms_) dattn_comm_destroy(comm);
}

void Gang::start() {
  for (int rank = 0; rank < key_.ranks; ++rank) std::thread([gang = shared_from_this(), rank] { gang->work(rank); }).detach();
  if (key_.ranks > 1) std::thread([gang = shared_from_this()] { gang->watch(); }).detach();
}

bool Gang::submit(CallRequest& request) {
  const std::lock_guard lock(mutex_);
  if (ended_) return false;
  const Meeting meeting{request.run, request.site};
  Arrivals& arrivals = meetings_[meeting];
  if (arrivals.of_rank.empty()) {
    arrivals.of_rank.resize(comms_.size());
    arrivals.deadline =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(key_.timeout_s));
  }
  const int rank = request.rank;
  if (rank < 0 || rank >= key_.ranks || arrivals.of_rank.at(static_cast<std::size_t>(rank)).has_value()) {
    finish(request, {DATTN_INTERNAL, "two devices act as rank " + std::to_string(rank) + " of " + std::to_string(key_.ranks) +
                                         " in one call; all mesh axes must be manual axes of shard_map"});
    return true;
  }
  arrivals.of_rank.at(static_cast<std::size_t>(rank)) = std::move(request);
  if (++arrivals.count == key_.ranks) {
    std::vector<std::int32_t> devices;
    for (const auto& arrived : arrivals.of_rank) devices.push_back(arrived->device.index);
    for (std::size_t i = 0; i < queues_.size(); ++i) {
      queues_[i].push_back(std::move(*arrivals.of_rank[i]));
      queues_[i].back().devices = devices;
    }
    meetings_.erase(meeting);
  }
  changed_.notify_all();
  return true;
}

void Gang::work(int rank) {
  const auto at = static_cast<std::size_t>(rank);
  std::map<std::vector<std::int32_t>, std::unique_ptr<Handles>> by_devices;
  while (true) {
    std::unique_lock lock(mutex_);
    wait_until(changed_, lock, [&] { return ended_ || !queues_[at].empty(); });
    if (queues_[at].empty()) return;
    const CallRequest request = std::move(queues_[at].front());
    queues_[at].pop_front();
    lock.unlock();
    Outcome outcome = perform(by_devices[request.devices], request);
    if (outcome.status != DATTN_OK) end(outcome, rank);
    finish(request, std::move(outcome));
  }
}

Outcome Gang::perform(std::unique_ptr<Handles>& handles, const CallRequest& request) {
  try {
    if (handles == nullptr) {
      handles = std::make_unique<Handles>(comms_.at(static_cast<std::size_t>(request.rank)));
      if (key_.ranks > 1 && request.device.type == DATTN_CUDA) {
        if (Outcome moved = handles->move_to(request.device, key_.timeout_s); moved.status != DATTN_OK) return moved;
      }
    }
    const PlannedCall* planned = nullptr;
    Outcome found = handles->plan_for(request, planned);
    return found.status == DATTN_OK ? execute(*planned, request) : found;
  } catch (const std::exception& error) {
    return {DATTN_SYSTEM, error.what()};
  }
}

// What is queued still runs, and fails at once, since the communicator has ended; what waits for other ranks fails here.
void Gang::end(const Outcome& outcome, int rank) {
  forget(this);
  if (rank >= 0) dattn_comm_abort(comms_.at(static_cast<std::size_t>(rank)), outcome.message.c_str());
  const std::lock_guard lock(mutex_);
  ended_ = true;
  for (auto& [meeting, arrivals] : meetings_) {
    for (const auto& request : arrivals.of_rank)
      if (request) finish(*request, {DATTN_PEER, outcome.message});
  }
  meetings_.clear();
  changed_.notify_all();
}

void Gang::watch() {
  std::unique_lock lock(mutex_);
  while (!ended_) {
    const auto first = std::min_element(meetings_.begin(), meetings_.end(),
                                        [](const auto& a, const auto& b) { return a.second.deadline < b.second.deadline; });
    if (first == meetings_.end()) {
      changed_.wait_for(lock, kLong);
    } else if (const auto deadline = first->second.deadline; Clock::now() < deadline) {
      changed_.wait_until(lock, deadline);
    } else {
      const Outcome outcome{DATTN_PEER, missing_text(first->second)};
      lock.unlock();
      end(outcome, 0);
      return;
    }
  }
}

std::string Gang::missing_text(const Arrivals& arrivals) const {
  std::string missing;
  for (std::size_t rank = 0; rank < arrivals.of_rank.size(); ++rank) {
    if (!arrivals.of_rank[rank]) missing += (missing.empty() ? "" : ", ") + std::to_string(rank);
  }
  const auto rounded = static_cast<long>(key_.timeout_s * 10);
  const std::string seconds = std::to_string(rounded / 10) + "." + std::to_string(rounded % 10);
  return "rank " + missing + " of " + std::to_string(key_.ranks) + " did not come to the attention call within " + seconds +
         " s: its device failed, or does not make the call; all devices of the mesh must (timeout_s= is the wait)";
}

}  // namespace dattn::jax
