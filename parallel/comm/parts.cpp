#include "parallel/comm/parts.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include <fmt/format.h>

#include "core/device/cuda_module.h"
#include "core/device/stream.h"

namespace dattn {
namespace {

template <class Part>
void check_direction(std::span<const Part> parts, int size, const OpLabel& label, const char* direction) {
  std::vector<bool> seen(static_cast<std::size_t>(size));
  for (const Part& part : parts) {
    ensure(part.peer >= 0 && part.peer < size, "{} part of {} names peer {} of a group of {} ranks", direction,
           label_text(label), part.peer, size);
    ensure(!seen[static_cast<std::size_t>(part.peer)], "{}: two {} parts for peer {}; join them", label_text(label), direction,
           part.peer);
    seen[static_cast<std::size_t>(part.peer)] = true;
  }
}

template <class Part>
const Part* own_part(std::span<const Part> parts, int rank) {
  for (const Part& part : parts) {
    if (part.peer == rank && part.bytes > 0) return &part;
  }
  return nullptr;
}

std::string transfer_text(const TransferNote& note) {
  return fmt::format("rank {} {} {} bytes {} rank {} in group '{}' of {} ({})", note.rank, note.sending ? "sends" : "awaits",
                     note.bytes, note.sending ? "to" : "from", note.peer, note.group, note.group_size, label_text(note.label));
}

template <class Part>
void check_device(std::span<const Part> parts, std::optional<Device>& device, const OpLabel& label) {
  for (const Part& part : parts) {
    if (part.bytes == 0) continue;
    ensure(!device || *device == part.device, "{}: memory of {} and of {} in one exchange; bring all to one device",
           label_text(label), to_text(device.value_or(Device{})), to_text(part.device));
    device = part.device;
  }
}

}  // namespace

Device check_parts(std::span<const SendPart> sends, std::span<const RecvPart> receives, int rank, int size,
                   const OpLabel& label) {
  check_direction(sends, size, label, "send");
  check_direction(receives, size, label, "receive");
  const SendPart* out = own_part(sends, rank);
  const RecvPart* in = own_part(receives, rank);
  const std::size_t sent = out ? out->bytes : 0;
  const std::size_t received = in ? in->bytes : 0;
  ensure(sent == received, "{}: rank {} sends itself {} bytes but receives {} from itself in the same exchange",
         label_text(label), rank, sent, received);
  std::optional<Device> device;
  check_device(sends, device, label);
  check_device(receives, device, label);
  return device.value_or(Device{});
}

void check_host_parts(std::span<const SendPart> sends, std::span<const RecvPart> receives, int rank, int size,
                      const OpLabel& label) {
  const Device device = check_parts(sends, receives, rank, size, label);
  ensure(!device.is_cuda(),
         "{}: this communicator moves memory of the host, not of {}; use nccl_world, or staged around it for device tensors",
         label_text(label), to_text(device));
}

void copy_own_part(std::span<const SendPart> sends, std::span<const RecvPart> receives, int rank) {
  const SendPart* out = own_part(sends, rank);
  const RecvPart* in = own_part(receives, rank);
  if (out == nullptr || in == nullptr || out->data == in->data) return;
  if (out->device.is_cuda()) {
    cuda_module().copy_bytes(in->data, out->data, in->bytes, current_stream().native());
  } else {
    std::memmove(in->data, out->data, in->bytes);
  }
}

int check_split(std::span<const int> ranks, int rank, int size, std::string_view name) {
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    ensure(ranks[i] >= 0 && ranks[i] < size && (i == 0 || ranks[i - 1] < ranks[i]),
           "split '{}': rank {} at place {} of a group of {}; list ascending ranks of the group", name, ranks[i], i, size);
  }
  const auto place = std::find(ranks.begin(), ranks.end(), rank);
  ensure(place != ranks.end(), "split '{}': rank {} is not in its own group of {} ranks", name, rank, ranks.size());
  return static_cast<int>(place - ranks.begin());
}

std::string label_text(const OpLabel& label) {
  std::string text(label.verb);
  if (label.layer >= 0) text += fmt::format(", layer {}", label.layer);
  if (label.step >= 0) text += fmt::format(", step {}", label.step);
  return text;
}

std::string no_life_text(const TransferNote& note, double timeout_s, bool peer_waits) {
  const char* finding = peer_waits ? "that rank waits too: the ranks do not make the same calls in the same order"
                                   : "it crashed, is stopped or its link is down; see its own output, or raise comm.timeout_s";
  return fmt::format("no sign of life from rank {} for {:.3g} s: {}; {}", note.peer, timeout_s, transfer_text(note), finding);
}

std::string gone_text(const TransferNote& note) {
  return fmt::format("rank {} has already ended its work: {}; the ranks do not make the same calls", note.peer,
                     transfer_text(note));
}

std::string size_mismatch_text(const TransferNote& note, std::size_t sent, const std::string& sender_label) {
  return fmt::format("sizes differ: {}, but rank {} sent {} bytes{}; both sides must state the same count", transfer_text(note),
                     note.peer, sent, sender_label.empty() ? "" : " (" + sender_label + ")");
}

}  // namespace dattn
