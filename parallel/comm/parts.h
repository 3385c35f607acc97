// What every back end does alike with the parts of an exchange: checks them, serves the part to oneself, and words the
// errors, so that a failure reads the same over threads, MPI and TCP.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/comm/communicator.h"

namespace dattn {

// Throws Error(kInternal) for a peer out of range, two parts of one direction and peer, or parts to oneself that are not
// matched within the same exchange, or parts of several devices; returns where the memory is.
Device check_parts(std::span<const SendPart> sends, std::span<const RecvPart> receives, int rank, int size,
                   const OpLabel& label);
// The same for a back end that moves memory of the host only: throws Error(kInternal) for any other.
void check_host_parts(std::span<const SendPart> sends, std::span<const RecvPart> receives, int rank, int size,
                      const OpLabel& label);
// Copies the part to oneself; that of a device on its current stream.
void copy_own_part(std::span<const SendPart> sends, std::span<const RecvPart> receives, int rank);

// Throws Error(kInternal) unless `ranks` are ascending ranks of a group of `size`, `rank` among them; returns its place.
int check_split(std::span<const int> ranks, int rank, int size, std::string_view name);

// One transfer, as error messages name it.
struct TransferNote {
  std::string_view group;
  int group_size = 1;
  int rank = 0;  // of the world, as peer is
  int peer = 0;
  bool sending = false;
  std::size_t bytes = 0;
  OpLabel label;
};

std::string label_text(const OpLabel& label);  // "rotate, layer 3, step 2"

// peer_waits: it answers, but waits itself (a deadlock); otherwise nothing was heard of it.
std::string no_life_text(const TransferNote& note, double timeout_s, bool peer_waits);
std::string gone_text(const TransferNote& note);  // the peer has returned from its work
std::string size_mismatch_text(const TransferNote& note, std::size_t sent, const std::string& sender_label);

}  // namespace dattn
