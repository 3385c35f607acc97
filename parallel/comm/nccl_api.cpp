#include "parallel/comm/nccl_api.h"

#include <dlfcn.h>

#include <fmt/format.h>

#include "core/base/library.h"

namespace dattn::nccl {
namespace {

// Fills the table; the names of functions that the library lacks are appended to `missing`.
class Table {
 public:
  Table(void* library, Api& api) : library_(library) {
    need(api.get_version, "ncclGetVersion");
    need(api.get_unique_id, "ncclGetUniqueId");
    need(api.comm_init_rank_config, "ncclCommInitRankConfig");
    need(api.comm_split, "ncclCommSplit");
    need(api.comm_finalize, "ncclCommFinalize");
    need(api.comm_destroy, "ncclCommDestroy");
    need(api.comm_abort, "ncclCommAbort");
    need(api.comm_get_async_error, "ncclCommGetAsyncError");
    need(api.comm_count, "ncclCommCount");
    need(api.comm_user_rank, "ncclCommUserRank");
    need(api.comm_register, "ncclCommRegister");
    need(api.comm_deregister, "ncclCommDeregister");
    need(api.group_start, "ncclGroupStart");
    need(api.group_end, "ncclGroupEnd");
    need(api.send, "ncclSend");
    need(api.recv, "ncclRecv");
    need(api.all_gather, "ncclAllGather");
    need(api.reduce_scatter, "ncclReduceScatter");
    need(api.all_reduce, "ncclAllReduce");
    need(api.get_error_string, "ncclGetErrorString");
    need(api.get_last_error, "ncclGetLastError");
    take(api.mem_alloc, "ncclMemAlloc");
    take(api.mem_free, "ncclMemFree");
    take(api.comm_window_register, "ncclCommWindowRegister");
    take(api.comm_window_deregister, "ncclCommWindowDeregister");
  }
  std::string missing;

 private:
  template <class Function>
  void take(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(dlsym(library_, name));
  }
  template <class Function>
  void need(Function*& function, const char* name) {
    take(function, name);
    if (function == nullptr) missing += missing.empty() ? name : std::string(", ") + name;
  }
  void* library_;
};

// Why an opened library is no good, or nothing; fills `api`.
std::string examine(void* library, Api& api) {
  const auto get_version = reinterpret_cast<Result (*)(int*)>(dlsym(library, "ncclGetVersion"));
  if (get_version == nullptr) return "has no ncclGetVersion, so it is no NCCL";
  if (get_version(&api.version) != kSuccess) return "does not tell its version";
  if (api.version < kLeastVersion) {
    return fmt::format("is NCCL {}, but at least {} is needed", version_text(api.version), version_text(kLeastVersion));
  }
  const Table table(library, api);
  if (!table.missing.empty()) return fmt::format("is NCCL {} without {}", version_text(api.version), table.missing);
  return {};
}

std::string path_of(const void* function, const std::string& asked_for) {
  Dl_info info{};
  return dladdr(function, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : asked_for;
}

}  // namespace

std::string version_text(int version) {
  const int unit = version < 10000 ? 1000 : 10000;  // 2.8 and before: 2804; from 2.9: 20900
  return fmt::format("{}.{}.{}", version / unit, version % unit / 100, version % 100);
}

std::optional<Api> find_nccl(std::string& report) {
  report.clear();
  for (const std::string& path : nvidia_library_paths("DATTN_NCCL", "libnccl.so.2")) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    Api api;
    std::string why;
    if (library == nullptr) {
      const char* error = dlerror();
      why = error != nullptr ? error : path;
    } else if (why = examine(library, api); !why.empty()) {
      why = fmt::format("{} {}", path, why);
      dlclose(library);
    } else {
      api.path = path_of(reinterpret_cast<const void*>(api.get_version), path);
      report = fmt::format("NCCL {} ({})", version_text(api.version), api.path);
      return api;
    }
    report += (report.empty() ? "" : "; ") + why;
  }
  report += fmt::format("; install NCCL {} or later (pip install nvidia-nccl-cu13), or set DATTN_NCCL to libnccl.so.2's path",
                        version_text(kLeastVersion));
  return std::nullopt;
}

}  // namespace dattn::nccl

namespace dattn {

NcclReport probe_nccl() {
  NcclReport report;
  if (const auto api = nccl::find_nccl(report.detail)) {
    report.found = true;
    report.version = nccl::version_text(api->version);
  }
  return report;
}

}  // namespace dattn
