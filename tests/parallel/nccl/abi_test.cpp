// Our declarations of NCCL's interface against the real nccl.h, at compile time. Configurations grow with NCCL's versions, so
// ours must be the beginning of the real one.
#include <nccl.h>

#include <cstddef>

#include <gtest/gtest.h>

#include "parallel/comm/nccl_api.h"
#include "tests/standins/same_abi.h"

namespace dattn::nccl {
namespace {

using standin::same;

static_assert(same<decltype(Api::get_version), decltype(ncclGetVersion)>);
static_assert(same<decltype(Api::get_unique_id), decltype(ncclGetUniqueId)>);
static_assert(same<decltype(Api::comm_init_rank_config), decltype(ncclCommInitRankConfig)>);
static_assert(same<decltype(Api::comm_split), decltype(ncclCommSplit)>);
static_assert(same<decltype(Api::comm_finalize), decltype(ncclCommFinalize)>);
static_assert(same<decltype(Api::comm_destroy), decltype(ncclCommDestroy)>);
static_assert(same<decltype(Api::comm_abort), decltype(ncclCommAbort)>);
static_assert(same<decltype(Api::comm_get_async_error), decltype(ncclCommGetAsyncError)>);
static_assert(same<decltype(Api::comm_count), decltype(ncclCommCount)>);
static_assert(same<decltype(Api::comm_user_rank), decltype(ncclCommUserRank)>);
static_assert(same<decltype(Api::comm_register), decltype(ncclCommRegister)>);
static_assert(same<decltype(Api::comm_deregister), decltype(ncclCommDeregister)>);
static_assert(same<decltype(Api::group_start), decltype(ncclGroupStart)>);
static_assert(same<decltype(Api::group_end), decltype(ncclGroupEnd)>);
static_assert(same<decltype(Api::send), decltype(ncclSend)>);
static_assert(same<decltype(Api::recv), decltype(ncclRecv)>);
static_assert(same<decltype(Api::all_gather), decltype(ncclAllGather)>);
static_assert(same<decltype(Api::reduce_scatter), decltype(ncclReduceScatter)>);
static_assert(same<decltype(Api::all_reduce), decltype(ncclAllReduce)>);
static_assert(same<decltype(Api::get_error_string), decltype(ncclGetErrorString)>);
static_assert(same<decltype(Api::get_last_error), decltype(ncclGetLastError)>);

static_assert(sizeof(UniqueId) == sizeof(ncclUniqueId));
static_assert(int{kSuccess} == ncclSuccess && int{kUnhandledCudaError} == ncclUnhandledCudaError &&
              int{kSystemError} == ncclSystemError && int{kInternalError} == ncclInternalError &&
              int{kInvalidArgument} == ncclInvalidArgument && int{kInvalidUsage} == ncclInvalidUsage &&
              int{kRemoteError} == ncclRemoteError && int{kInProgress} == ncclInProgress);
static_assert(int{kSum} == ncclSum);
static_assert(int{kInt8} == ncclInt8 && int{kInt32} == ncclInt32 && int{kFloat32} == ncclFloat32 &&
              int{kFloat64} == ncclFloat64 && int{kFloat16} == ncclFloat16 && int{kBfloat16} == ncclBfloat16);
static_assert(kUndefined == NCCL_CONFIG_UNDEF_INT && NCCL_VERSION(2, 19, 0) == kLeastVersion);

#if NCCL_VERSION_CODE >= 22800
static_assert(same<decltype(Api::mem_alloc), decltype(ncclMemAlloc)>);
static_assert(same<decltype(Api::mem_free), decltype(ncclMemFree)>);
static_assert(same<decltype(Api::comm_window_register), decltype(ncclCommWindowRegister)>);
static_assert(same<decltype(Api::comm_window_deregister), decltype(ncclCommWindowDeregister)>);
static_assert(kCtaPolicyZero == NCCL_CTA_POLICY_ZERO && kWindowSymmetric == NCCL_WIN_COLL_SYMMETRIC);
static_assert(sizeof(Config) <= sizeof(ncclConfig_t));
static_assert(offsetof(Config, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(offsetof(Config, max_ctas) == offsetof(ncclConfig_t, maxCTAs));
static_assert(offsetof(Config, net_name) == offsetof(ncclConfig_t, netName));
static_assert(offsetof(Config, split_share) == offsetof(ncclConfig_t, splitShare));
static_assert(offsetof(Config, comm_name) == offsetof(ncclConfig_t, commName));
static_assert(offsetof(Config, cta_policy) == offsetof(ncclConfig_t, CTAPolicy));
static_assert(offsetof(Config, nvlink_centric_sched) == offsetof(ncclConfig_t, nvlinkCentricSched));
#endif

TEST(NcclAbi, ConfigStartsAsNcclsOwn) {
  const ncclConfig_t real = NCCL_CONFIG_INITIALIZER;
  const Config ours;
  EXPECT_EQ(ours.magic, real.magic);
  EXPECT_EQ(ours.blocking, real.blocking);
  EXPECT_EQ(ours.nvlink_centric_sched, real.nvlinkCentricSched);
}

}  // namespace
}  // namespace dattn::nccl
