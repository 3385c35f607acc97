// The MPI shim, libdattn_mpi.so: the only file that includes mpi.h. Point-to-point calls on one duplicated communicator;
// no MPI collective and no MPI split after that, because those cannot time out.
#define OMPI_SKIP_MPICXX 1  // the C++ bindings of old, which do not compile without warnings
#define MPICH_SKIP_MPICXX 1
#include "parallel/comm/mpi_shim.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <list>
#include <utility>
#include <vector>

#include <mpi.h>

namespace {

constexpr int kControlTag = 0;  // the tags of transfers are moved up by one
constexpr std::size_t kControlCapacity = 2048;

struct ControlSend {
  MPI_Request request = MPI_REQUEST_NULL;
  std::vector<char> data;
};

struct State {
  MPI_Comm comm = MPI_COMM_NULL;
  bool initialised_here = false;
  std::vector<MPI_Request> requests;  // with their cookies at the same places
  std::vector<std::uint64_t> cookies;
  std::vector<bool> receives;
  std::vector<int> finished;  // of MPI_Testsome
  std::vector<MPI_Status> statuses;
  std::vector<DattnMpiDone> done;
  MPI_Request control = MPI_REQUEST_NULL;
  std::vector<char> control_data = std::vector<char>(kControlCapacity);
  std::list<ControlSend> control_sends;
};

State& state() {
  static State value;
  return value;
}

const char* library_version() {
  static char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  return text;
}

void post_control_receive() {
  State& s = state();
  MPI_Irecv(s.control_data.data(), static_cast<int>(kControlCapacity), MPI_BYTE, MPI_ANY_SOURCE, kControlTag, s.comm,
            &s.control);
}

// A host program that runs MPI itself calls it from its own threads, beside ours: that takes MPI_THREAD_MULTIPLE.
int initialise(char* error, std::size_t error_bytes) {
  int initialised = 0, finalised = 0, provided = MPI_THREAD_SINGLE;
  MPI_Finalized(&finalised);
  if (finalised) {
    std::snprintf(error, error_bytes, "MPI has been finalised in this process and cannot be used again; keep the communicator");
    return 1;
  }
  MPI_Initialized(&initialised);
  if (initialised) {
    MPI_Query_thread(&provided);
    if (provided >= MPI_THREAD_MULTIPLE) return 0;
    std::snprintf(error, error_bytes,
                  "MPI was initialised by the host program with thread level %d, but level %d (MPI_THREAD_MULTIPLE) is needed "
                  "beside it; initialise it with MPI_Init_thread(MPI_THREAD_MULTIPLE)",
                  provided, MPI_THREAD_MULTIPLE);
    return 1;
  }
  if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS) {
    std::snprintf(error, error_bytes, "MPI_Init_thread failed; was this process started by mpirun or srun?");
    return 1;
  }
  state().initialised_here = true;
  if (provided >= MPI_THREAD_SERIALIZED) return 0;
  std::snprintf(error, error_bytes,
                "this MPI offers thread level %d, but level %d (MPI_THREAD_SERIALIZED) is needed; use a build "
                "with thread support",
                provided, MPI_THREAD_SERIALIZED);
  return 1;
}

int join(const void* host_comm, int* rank, int* size, int* max_tag, char* error, std::size_t error_bytes) {
  State& s = state();
  if (s.comm != MPI_COMM_NULL) {
    std::snprintf(error, error_bytes, "this process is part of an MPI job already; use its communicator, or destroy it first");
    return 1;
  }
  if (initialise(error, error_bytes) != 0) return 1;
  const MPI_Comm from = host_comm ? *static_cast<const MPI_Comm*>(host_comm) : MPI_COMM_WORLD;
  if (MPI_Comm_dup(from, &s.comm) != MPI_SUCCESS) {
    std::snprintf(error, error_bytes, "MPI_Comm_dup of the host's communicator failed");
    return 1;
  }
  MPI_Comm_set_errhandler(s.comm, MPI_ERRORS_RETURN);
  MPI_Comm_rank(s.comm, rank);
  MPI_Comm_size(s.comm, size);
  int* bound = nullptr;
  int found = 0;
  MPI_Comm_get_attr(s.comm, MPI_TAG_UB, &bound, &found);
  *max_tag = (found ? *bound : 32767) - 1;
  post_control_receive();
  return 0;
}

void keep(MPI_Request request, bool receives, std::uint64_t cookie) {
  State& s = state();
  s.receives.push_back(receives);
  s.requests.push_back(request);
  s.cookies.push_back(cookie);
}

int send(int peer, int tag, const void* data, std::size_t bytes, std::uint64_t cookie) {
  MPI_Request request;
  const int error = MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, peer, tag + 1, state().comm, &request);
  if (error == MPI_SUCCESS) keep(request, false, cookie);
  return error;
}

int receive(int peer, int tag, void* data, std::size_t bytes, std::uint64_t cookie) {
  MPI_Request request;
  const int error = MPI_Irecv(data, static_cast<int>(bytes), MPI_BYTE, peer, tag + 1, state().comm, &request);
  if (error == MPI_SUCCESS) keep(request, true, cookie);
  return error;
}

DattnMpiDone describe(std::uint64_t cookie, const MPI_Status& status, bool failed) {
  DattnMpiDone done{};
  done.cookie = cookie;
  int count = 0;
  MPI_Get_count(&status, MPI_BYTE, &count);
  done.bytes = count == MPI_UNDEFINED ? 0 : static_cast<std::size_t>(count);
  if (!failed || status.MPI_ERROR == MPI_SUCCESS) return done;
  int error_class = 0, length = 0;
  MPI_Error_class(status.MPI_ERROR, &error_class);
  done.error = error_class == MPI_ERR_TRUNCATE ? 1 : 2;
  char text[MPI_MAX_ERROR_STRING] = {};
  MPI_Error_string(status.MPI_ERROR, text, &length);
  std::snprintf(done.text, sizeof done.text, "%.*s", length, text);
  return done;
}

int poll(const DattnMpiDone** all_done) {
  State& s = state();
  s.done.clear();
  *all_done = nullptr;
  if (s.requests.empty()) return 0;
  const std::size_t pending = s.requests.size();
  s.finished.resize(pending);
  s.statuses.resize(pending);
  int count = 0;
  const int error = MPI_Testsome(static_cast<int>(pending), s.requests.data(), &count, s.finished.data(), s.statuses.data());
  if (count == MPI_UNDEFINED || count <= 0) return 0;
  const bool failed = error == MPI_ERR_IN_STATUS;
  for (int i = 0; i < count; ++i) {
    const auto place = static_cast<std::size_t>(s.finished[static_cast<std::size_t>(i)]);
    s.done.push_back(describe(s.cookies[place], s.statuses[static_cast<std::size_t>(i)], failed));
    s.requests[place] = MPI_REQUEST_NULL;
  }
  // The rest keeps its order, the oldest first.
  std::size_t kept = 0;
  for (std::size_t i = 0; i < pending; ++i) {
    if (s.requests[i] == MPI_REQUEST_NULL) continue;
    s.requests[kept] = s.requests[i];
    s.receives[kept] = s.receives[i];
    s.cookies[kept++] = s.cookies[i];
  }
  s.requests.resize(kept);
  s.cookies.resize(kept);
  s.receives.resize(kept);
  *all_done = s.done.data();
  return count;
}

int send_control(int peer, const void* data, std::size_t bytes) {
  State& s = state();
  s.control_sends.remove_if([](ControlSend& sent) {
    int done = 0;
    MPI_Test(&sent.request, &done, MPI_STATUS_IGNORE);
    return done != 0;
  });
  if (s.control_sends.size() > 4096) return MPI_ERR_OTHER;  // a peer that takes nothing any more
  ControlSend& message = s.control_sends.emplace_back();
  const auto* begin = static_cast<const char*>(data);
  message.data.assign(begin, begin + bytes);
  return MPI_Isend(message.data.data(), static_cast<int>(bytes), MPI_BYTE, peer, kControlTag, s.comm, &message.request);
}

std::size_t receive_control(int* peer, void* data, std::size_t capacity) {
  State& s = state();
  if (s.control == MPI_REQUEST_NULL) return 0;
  int done = 0;
  MPI_Status status;
  if (MPI_Test(&s.control, &done, &status) != MPI_SUCCESS || !done) return 0;
  int count = 0;
  MPI_Get_count(&status, MPI_BYTE, &count);
  *peer = status.MPI_SOURCE;
  const std::size_t bytes = static_cast<std::size_t>(count) < capacity ? static_cast<std::size_t>(count) : capacity;
  std::memcpy(data, s.control_data.data(), bytes);
  post_control_receive();
  return bytes;
}

void cancel_receives() {
  State& s = state();
  for (std::size_t i = 0; i < s.requests.size(); ++i) {
    if (s.receives[i]) MPI_Cancel(&s.requests[i]);
  }
}

void leave(int clean) {
  State& s = state();
  int finalised = 0;
  MPI_Finalized(&finalised);
  if (!clean || finalised || s.comm == MPI_COMM_NULL) return;
  if (s.control != MPI_REQUEST_NULL) {
    MPI_Cancel(&s.control);
    MPI_Wait(&s.control, MPI_STATUS_IGNORE);
  }
  for (ControlSend& sent : s.control_sends) MPI_Wait(&sent.request, MPI_STATUS_IGNORE);
  s.control_sends.clear();
  if (s.initialised_here) MPI_Finalize();  // frees the communicator too; MPI_Comm_free would be one more collective call
  s.comm = MPI_COMM_NULL;
}

void kill_job(int exit_code) { MPI_Abort(MPI_COMM_WORLD, exit_code); }

}  // namespace

extern "C" __attribute__((visibility("default"))) const DattnMpiTable* dattn_mpi_table(void) {
  static const DattnMpiTable table{DATTN_MPI_SHIM_VERSION, library_version, join,  send,    receive, poll, send_control,
                                   receive_control,        cancel_receives, leave, kill_job};
  return &table;
}
