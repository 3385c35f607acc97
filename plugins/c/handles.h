// What the opaque handles of dattn.h hold. A handle is a shared pointer; what is made from it holds another one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "parallel/attention.h"
#include "parallel/comm/rank_place.h"
#include "parallel/mesh.h"
#include "plugins/c/boundary.h"

namespace dattn::c {

struct Comm {
  std::shared_ptr<const Context> context;
  std::shared_ptr<Comm> control;  // of an NCCL communicator
  std::unique_ptr<Communicator> world;
  std::vector<RankPlace> places = {};  // of all ranks, once told

  // That the bits are those of any mesh; all ranks make the call, and are refused alike.
  void require_same_instructions() {
    if (places.empty()) places = gather_alike(*world, place_of_rank(false));
    dattn::require_same_instructions(places);
  }

  std::string rank_text() const { return fmt::format("rank {}/{}", world->rank(), world->size()); }
};

struct MeshOnComm {
  std::shared_ptr<Comm> comm;
  Mesh mesh;

  MeshOnComm(std::shared_ptr<Comm> on, const MeshShape& shape) : comm(std::move(on)), mesh(*comm->world, shape) {}
  Device device() const { return comm->context->device; }
};

// One call of a rank: where it computes, and who it is.
struct RankScope : CallScope {
  explicit RankScope(const Comm& comm) : CallScope(*comm.context, comm.rank_text()) {}
  explicit RankScope(const MeshOnComm& mesh) : RankScope(*mesh.comm) {}
};

// Makes an object for a new handle; the handle is written only where all went well.
template <class Handle, class Make>
dattn_status create(Handle** handle, std::string_view name, const Make& make) noexcept {
  return guarded([&] {
    require_pointer(handle, name);
    *handle = std::make_unique<Handle>(Handle{make()}).release();
  });
}

// Runs body() as a rank that the others may wait for: what fails but bad input, which is found before anything is sent, ends
// the job, so that they need not wait for the deadline.
template <class Body>
void collective(const Comm& comm, const Body& body) {
  const RankScope scope(comm);
  try {
    body();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kBadInput) comm.world->abort(error.what(), error.code());
    throw;
  } catch (const std::exception& error) {
    comm.world->abort(fmt::format("{} [{}]", error.what(), comm.rank_text()), ErrorCode::kSystem);
    throw;
  }
}

void write_positions(const Positions& rows, int64_t* positions, int64_t capacity);  // throws where there are more than capacity

}  // namespace dattn::c

struct dattn_context {
  std::shared_ptr<const dattn::c::Context> held;
};

struct dattn_comm {
  std::shared_ptr<dattn::c::Comm> held;
};

struct dattn_mesh {
  std::shared_ptr<dattn::c::MeshOnComm> held;
};
