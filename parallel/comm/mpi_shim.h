// The function table of the MPI shim: all that this library asks of MPI, in plain C types, so that one file (mpi_shim.cpp)
// is built against an MPI and nothing else knows that there is one. Calls must not overlap in time.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

#define DATTN_MPI_SHIM_VERSION 2

struct DattnMpiDone {
  uint64_t cookie;
  size_t bytes;   // that arrived
  int32_t error;  // 0, 1: cut off, 2: failed, see text
  char text[256];
};

struct DattnMpiTable {
  int32_t version;
  // MPI's own version string; may be called before join.
  const char* (*library_version)(void);
  // Initialises MPI unless it is, duplicates the host's communicator (MPI_Comm*; NULL: the world): the only collective calls.
  // Returns 0, or 1 and an error text: also where this process has joined a job and not left it.
  int (*join)(const void* host_comm, int* rank, int* size, int* max_tag, char* error, size_t error_bytes);
  int (*send)(int peer, int tag, const void* data, size_t bytes, uint64_t cookie);
  int (*receive)(int peer, int tag, void* data, size_t bytes, uint64_t cookie);
  // The transfers finished since the last call, valid until the next one; returns their number.
  int (*poll)(const struct DattnMpiDone** done);
  // Control messages: sends are copied; receive returns the bytes of the next one that has arrived, or 0.
  int (*send_control)(int peer, const void* data, size_t bytes);
  size_t (*receive_control)(int* peer, void* data, size_t capacity);
  // After a failure: memory that is awaited may go away.
  void (*cancel_receives)(void);
  // clean: nothing is under way anywhere; finalises MPI if join initialised it. Otherwise MPI is left as it is.
  void (*leave)(int clean);
  void (*kill_job)(int exit_code);
};

// The one symbol that the shim exports.
const struct DattnMpiTable* dattn_mpi_table(void);
}
