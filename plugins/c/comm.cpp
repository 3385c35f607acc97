// Contexts, communicators and meshes.
#include <cstdlib>

#include "core/base/log.h"
#include "parallel/comm/mpi.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/rank_place.h"
#include "parallel/comm/staged.h"
#include "parallel/comm/tcp.h"
#include "parallel/comm/thread.h"
#include "plugins/c/callback_communicator.h"
#include "plugins/c/handles.h"
#include "plugins/c/tensor.h"

namespace dattn::c {
namespace {

CommOptions comm_options(const dattn_comm_options* given) {
  const dattn_comm_options options = read_optional(given, "dattn_comm_options");
  require(options.timeout_s >= 0, "dattn_comm_options.timeout_s is {}; it must be positive, or 0 for 60", options.timeout_s);
  return {options.timeout_s > 0 ? options.timeout_s : CommOptions{}.timeout_s};
}

// Device memory travels staged through the host where the communicator moves the host's only.
std::shared_ptr<Comm> on_host(const dattn_context* context, std::unique_ptr<Communicator> world) {
  const bool stage = context->held->device.is_cuda();
  return std::make_shared<Comm>(Comm{context->held, nullptr, stage ? staged(std::move(world)) : std::move(world)});
}

template <class Make>
dattn_status create_comm(dattn_context* context, dattn_comm** comm, const Make& make) noexcept {
  return create(comm, "comm", [&] {
    require_pointer(context, "context");
    const CallScope scope(*context->held, {});
    return on_host(context, make());
  });
}

}  // namespace
}  // namespace dattn::c

using namespace dattn;
using namespace dattn::c;

dattn_status dattn_context_create(const dattn_context_options* given, dattn_context** context) {
  return create(context, "context", [&] {
    if (std::getenv("DATTN_LOG") == nullptr) set_log_level(LogLevel::kQuiet);  // stderr is the host's
    const dattn_context_options options = read_optional(given, "dattn_context_options");
    require(options.threads >= 0, "dattn_context_options.threads is {}; it must be positive, or 0", options.threads);
    const Device device = to_device(options.device, "dattn_context_options.device");
    const DeviceScope scope(device);  // refuses a device that is not there
    return std::make_shared<const Context>(Context{device, options.threads});
  });
}

void dattn_context_destroy(dattn_context* context) { delete context; }

dattn_status dattn_comm_self(dattn_context* context, dattn_comm** comm) {
  return create_comm(context, comm, [] { return self_communicator(); });
}

dattn_status dattn_comm_threads(dattn_context* context, int32_t ranks, const dattn_comm_options* options, dattn_comm** comms) {
  return guarded([&] {
    require_pointer(context, "context");
    require_pointer(comms, "comms");
    std::vector<std::unique_ptr<dattn_comm>> made;
    for (auto& world : thread_worlds(ranks, comm_options(options))) {
      made.push_back(std::make_unique<dattn_comm>(dattn_comm{on_host(context, std::move(world))}));
    }
    for (auto& comm : made) *comms++ = comm.release();
  });
}

dattn_status dattn_comm_mpi(dattn_context* context, const void* host_comm, const dattn_comm_options* options,
                            dattn_comm** comm) {
  return create_comm(context, comm, [&] { return mpi_world(comm_options(options), host_comm); });
}

dattn_status dattn_comm_tcp(dattn_context* context, const char* host, int32_t port, int32_t rank, int32_t size,
                            const dattn_comm_options* options, dattn_comm** comm) {
  return create_comm(context, comm, [&] {
    require_pointer(host, "host");
    require(size >= 1 && rank >= 0 && rank < size, "rank {} of {} ranks; ranks are numbered from 0", rank, size);
    return tcp_world({host, port, rank, size}, comm_options(options));
  });
}

dattn_status dattn_comm_callbacks(dattn_context* context, const dattn_callbacks* callbacks, const dattn_comm_options* options,
                                  dattn_comm** comm) {
  return create_comm(context, comm,
                     [&] { return callback_world(read_struct(callbacks, "dattn_callbacks"), comm_options(options)); });
}

dattn_status dattn_comm_nccl(dattn_context* context, dattn_comm* control, void* host_comm, const dattn_comm_options* given,
                             dattn_comm** comm) {
  return create(comm, "comm", [&] {
    require_pointer(context, "context");
    require_pointer(control, "control");
    const CallScope scope(*context->held, control->held->rank_text());
    const Device device = context->held->device;
    require(device.is_cuda(), "NCCL moves memory of CUDA devices, but the context computes on {}", to_text(device));
    const CommOptions options = comm_options(given);
    NcclOptions nccl = NcclOptions::from_environment(options.timeout_s);
    nccl.lent = static_cast<nccl::Comm>(host_comm);
    std::vector<RankPlace> places = gather_alike(*control->held->world, place_of_rank(true));
    return std::make_shared<Comm>(
        Comm{context->held, control->held, nccl_world(whole_group(*control->held->world), nccl), std::move(places)});
  });
}

int32_t dattn_comm_rank(const dattn_comm* comm) { return comm == nullptr ? -1 : comm->held->world->rank(); }
int32_t dattn_comm_size(const dattn_comm* comm) { return comm == nullptr ? -1 : comm->held->world->size(); }

void dattn_comm_abort(dattn_comm* comm, const char* reason) {
  if (comm == nullptr) return;
  guarded([&] { comm->held->world->abort(reason != nullptr ? reason : "the host program ended the job"); });
}

void dattn_comm_destroy(dattn_comm* comm) { delete comm; }

dattn_status dattn_mesh_create(dattn_comm* comm, const dattn_mesh_options* given, dattn_mesh** mesh) {
  return create(mesh, "mesh", [&] {
    require_pointer(comm, "comm");
    const RankScope scope(*comm->held);
    const dattn_mesh_options options = read_struct(given, "dattn_mesh_options");
    const int sizes[] = {options.data, options.ring_outer, options.ring, options.rows, options.ulysses, options.tensor};
    MeshShape shape;
    for (std::size_t i = 0; i < kAxes.size(); ++i) shape.set(kAxes[i], sizes[i] == 0 ? 1 : sizes[i]);
    return std::make_shared<MeshOnComm>(comm->held, shape);
  });
}

void dattn_mesh_destroy(dattn_mesh* mesh) { delete mesh; }
