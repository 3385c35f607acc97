/* dattn.h: the stable C interface of dattn, exact attention whose heads and sequence are sharded over many ranks.
 *
 *   dattn_context_create(NULL, &context);                    device, threads
 *   dattn_comm_mpi(context, NULL, &comm);                    or _self, _threads, _tcp, _nccl, _callbacks
 *   dattn_mesh_create(comm, &(dattn_mesh_options){.struct_size = sizeof(dattn_mesh_options), .ring = 4}, &mesh);
 *   dattn_plan_create(mesh, &options, &plan);                checks, plans; nothing is sent
 *   dattn_attention_forward(plan, &forward);                 this rank's shards in, this rank's rows out
 *   dattn_attention_backward(plan, &backward);
 *
 * Conventions
 * - A function that can fail returns dattn_status. On failure nothing was written to output handles, and dattn_last_error()
 *   of the same thread has the message: what is wrong, both values, the remedy, the rank.
 * - Every struct of options, arguments or results begins with struct_size: set it to sizeof(the struct). Members are only ever
 *   added at the end, and mean their default when they are 0 or NULL, so a program built against an older header works with a
 *   newer library. dattn_device, dattn_dtype, dattn_tensor (DLPack's) and dattn_part have no size and never change.
 * - Handles are opaque. Whoever creates one destroys it, in any order: a handle keeps alive what it was made from. Destroying
 *   NULL does nothing. No function exits or installs signal handlers; none prints, unless the environment has DATTN_LOG=info or
 *   debug, for lines on stderr.
 * - Threads: handles of different ranks may be used at the same time; one rank's handles, by one thread at a time. All ranks
 *   of a communicator make the same calls in the same order (mesh_create, attention_*, shard_*, cache_*). Every wait has a
 *   deadline (dattn_comm_options.timeout_s): when a rank fails or vanishes, the others return DATTN_PEER.
 * - Tensors are windows on memory of the caller: never kept after the call, nor freed. Inputs are read where they lie; results
 *   are made in memory of the library and copied into the caller's tensors at the end. Shapes and strides count elements.
 *   Axis order is stated where a tensor is named; any strides, but the last axis of 4-d tensors is contiguous.
 *   B batch, S queries and T keys of this rank, H query and K key/value heads of this rank, D dim of q and k, V of v.
 * - Symbols are only ever added within one major version; dattn_version() says which is loaded.
 */
#ifndef DATTN_H
#define DATTN_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define DATTN_API __attribute__((visibility("default")))
#else
#define DATTN_API
#endif

#define DATTN_VERSION_MAJOR 1
#define DATTN_VERSION_MINOR 0
#define DATTN_VERSION_PATCH 0

#ifdef __cplusplus
extern "C" {
#endif

/* NOLINTBEGIN(modernize-use-using): C */

typedef enum dattn_status {
  DATTN_OK = 0,
  DATTN_INTERNAL = 1,  /* a defect of this library */
  DATTN_BAD_INPUT = 2, /* an option, shape, type or device that is refused; nothing was changed, nothing sent */
  DATTN_PEER = 3,      /* another rank failed, vanished or did not answer within the deadline */
  DATTN_DIVERGED = 4,  /* unused here */
  DATTN_SYSTEM = 5     /* the system refused: a library that is missing, memory, a device */
} dattn_status;

/* major * 10000 + minor * 100 + patch of the loaded library. */
DATTN_API int32_t dattn_version(void);
/* The message of this thread's last failure, until its next call; "" before the first. Never NULL. */
DATTN_API const char* dattn_last_error(void);

/* The memory layout of DLPack's DLTensor (dlpack.h, version 0.2 and later), so that a pointer to one may be passed:
 * (const dattn_tensor*)&managed->dl_tensor. */
typedef struct dattn_device {
  int32_t type; /* DATTN_CPU, DATTN_CUDA: kDLCPU, kDLCUDA */
  int32_t index;
} dattn_device;
enum { DATTN_CPU = 1, DATTN_CUDA = 2 };

typedef struct dattn_dtype {
  uint8_t code; /* DATTN_FLOAT, DATTN_BFLOAT: kDLFloat, kDLBfloat */
  uint8_t bits;
  uint16_t lanes; /* 1 */
} dattn_dtype;
enum { DATTN_INT = 0, DATTN_FLOAT = 2, DATTN_BFLOAT = 4 };

typedef struct dattn_tensor {
  void* data;
  dattn_device device;
  int32_t ndim;
  dattn_dtype dtype;
  int64_t* shape;
  int64_t* strides; /* NULL: contiguous, last axis fastest */
  uint64_t byte_offset;
} dattn_tensor;

/* ---- Context: where a rank computes ---------------------------------------------------------------------------------- */

typedef struct dattn_context dattn_context;

typedef struct dattn_context_options {
  size_t struct_size;
  dattn_device device; /* {0, 0} = the cpu */
  int32_t threads;     /* of a rank, on the cpu; 0 = as the calling thread's OpenMP setting says */
} dattn_context_options;

DATTN_API dattn_status dattn_context_create(const dattn_context_options* options, dattn_context** context);
DATTN_API void dattn_context_destroy(dattn_context* context);

/* ---- Communicators: the ranks ---------------------------------------------------------------------------------------- */

typedef struct dattn_comm dattn_comm;

typedef struct dattn_comm_options {
  size_t struct_size;
  double timeout_s; /* a rank that shows no sign of life for this long has failed; 0 = 60 */
} dattn_comm_options;

/* One rank. */
DATTN_API dattn_status dattn_comm_self(dattn_context* context, dattn_comm** comm);
/* `ranks` ranks as threads of this process: fills comms[0 .. ranks); the caller gives one to each of its threads. */
DATTN_API dattn_status dattn_comm_threads(dattn_context* context, int32_t ranks, const dattn_comm_options* options,
                                          dattn_comm** comms);
/* The MPI job that this process belongs to. host_comm: address of the host's MPI_Comm, all of whose ranks make the call (it is
 * duplicated, never freed), or NULL for MPI_COMM_WORLD. MPI is initialised unless it is, and finalised only if initialised
 * here; a host that initialised it asked for MPI_THREAD_MULTIPLE. A process is in one such communicator at a time. */
DATTN_API dattn_status dattn_comm_mpi(dattn_context* context, const void* host_comm, const dattn_comm_options* options,
                                      dattn_comm** comm);
/* Processes joined by sockets; rank 0 listens at host:port. */
DATTN_API dattn_status dattn_comm_tcp(dattn_context* context, const char* host, int32_t port, int32_t rank, int32_t size,
                                      const dattn_comm_options* options, dattn_comm** comm);

/* The host carries everything: for frameworks with communication of their own, such as a torch ProcessGroup. Collectives
 * (gathers, sums in rank order) are made of its transfers, so that it needs none of its own. Functions return
 * 0, or another value after they have failed. They are called by the thread that made the dattn call, never by others. */
typedef struct dattn_part {
  int32_t peer; /* rank of the communicator */
  void* data;   /* host memory; what is sent must not be written to */
  uint64_t bytes;
} dattn_part;

typedef struct dattn_callbacks {
  size_t struct_size;
  void* user; /* passed to every call */
  int32_t rank;
  int32_t size;
  /* Starts all sends and receives as one group, at most one of each for a peer, and gives back a request. Messages between two
   * ranks with one tag (below 2^30) arrive in the order they are started in. Memory stays valid until wait. */
  int (*start)(void* user, uint32_t tag, const dattn_part* sends, int32_t send_count, const dattn_part* receives,
               int32_t receive_count, void** request);
  /* Returns when the group is done; fails, within timeout_s, where a peer is lost. */
  int (*wait)(void* user, void* request, double timeout_s);
  /* Why the last call on this thread failed; may be NULL. Read at once. */
  const char* (*error)(void* user);
  /* Optional: ends the job on all ranks, as far as the host can; called once, after a failure on this rank. */
  void (*abort)(void* user, const char* reason);
  /* Optional: called when the last handle that uses the callbacks is gone. */
  void (*release)(void* user);
} dattn_callbacks;

DATTN_API dattn_status dattn_comm_callbacks(dattn_context* context, const dattn_callbacks* callbacks,
                                            const dattn_comm_options* options, dattn_comm** comm);
/* Tensors of the context's CUDA device by NCCL. `control`, any communicator of the same ranks (of a cpu context, as a rule),
 * carries ids, errors and signs of life. Ranks whose dattn, NCCL, cuDNN or CUDA runtime have other versions are refused on all
 * of them. host_comm: a ncclComm_t of the host with the same ranks on this device, used but never destroyed, or NULL for one of
 * our own. */
DATTN_API dattn_status dattn_comm_nccl(dattn_context* context, dattn_comm* control, void* host_comm,
                                       const dattn_comm_options* options, dattn_comm** comm);

DATTN_API int32_t dattn_comm_rank(const dattn_comm* comm);
DATTN_API int32_t dattn_comm_size(const dattn_comm* comm);
/* Ends the job: current and later waits of all ranks fail with this reason. */
DATTN_API void dattn_comm_abort(dattn_comm* comm, const char* reason);
DATTN_API void dattn_comm_destroy(dattn_comm* comm);

/* ---- Mesh: named axes over the ranks ---------------------------------------------------------------------------------- */

typedef struct dattn_mesh dattn_mesh;

/* Ranks along each axis, slowest first; 0 = 1. Their product is the size of the communicator. */
typedef struct dattn_mesh_options {
  size_t struct_size;
  int32_t data;       /* batch rows; takes no part in attention */
  int32_t ring_outer; /* sequence: rings of rings, between nodes */
  int32_t ring;       /* sequence: keys and values go around */
  int32_t rows;       /* sequence: queries are gathered (strategies grid, grid_gather, tree, allgather) */
  int32_t ulysses;    /* sequence and, inside attention, heads */
  int32_t tensor;     /* heads */
} dattn_mesh_options;

DATTN_API dattn_status dattn_mesh_create(dattn_comm* comm, const dattn_mesh_options* options, dattn_mesh** mesh);
DATTN_API void dattn_mesh_destroy(dattn_mesh* mesh);

/* ---- Plan: one attention, for tensors of given sizes ------------------------------------------------------------------- */

typedef struct dattn_plan dattn_plan;

enum { DATTN_BIAS_NONE = 0, DATTN_BIAS = 1, DATTN_BIAS_PER_BATCH = 2, DATTN_BIAS_PER_HEAD = 4 };

typedef struct dattn_attention_options {
  size_t struct_size;
  int64_t batch;    /* of one data coordinate */
  int64_t seq_q;    /* of the whole sequence */
  int64_t seq_kv;   /* 0 = seq_q */
  int64_t heads;    /* of the whole model */
  int64_t kv_heads; /* 0 = heads; divides heads */
  int64_t dim_qk;
  int64_t dim_v;           /* 0 = dim_qk */
  dattn_dtype dtype;       /* of q, k, v, bias, out and dout: float 16, 32, 64, bfloat 16 */
  const char* attention;   /* YAML or JSON text with the keys of a config's `attention` section (configs/SCHEMA.md):
                              {"mask": {"kind": "window", "left": 128}, "softcap": 30, "dropout": {"p": 0.1, "seed": 1}};
                              NULL = causal */
  const char* layout;      /* contiguous, zigzag (NULL), striped, balanced */
  const char* strategy;    /* auto (NULL), or one of `dattn plan --help` */
  const char* determinism; /* off, repeatable, invariant; NULL = repeatable on the cpu, off on CUDA devices. invariant: the
                              first call on a communicator of CPUs, and NCCL, refuse other kernels and GPUs on all ranks */
  int32_t bias;            /* DATTN_BIAS, or-ed with what it differs by; DATTN_BIAS_NONE: calls bring none */
  int32_t sink;            /* not 0: calls bring sink logits */
} dattn_attention_options;

/* What this rank does. */
typedef struct dattn_plan_info {
  size_t struct_size;
  int64_t q_rows, kv_rows;                           /* S, T */
  int64_t first_head, heads;                         /* of the query heads; heads = H */
  int64_t first_kv_head, kv_heads;                   /* of the key/value heads; kv_heads = K */
  int64_t forward_bytes, backward_bytes;             /* payload received, without statistics */
  int64_t forward_stats_bytes, backward_stats_bytes; /* lse and delta */
  int64_t forward_memory, backward_memory;           /* most bytes held beside the caller's tensors */
  double forward_flops, backward_flops;
} dattn_plan_info;

DATTN_API dattn_status dattn_plan_create(dattn_mesh* mesh, const dattn_attention_options* options, dattn_plan** plan);
DATTN_API void dattn_plan_destroy(dattn_plan* plan);
DATTN_API dattn_status dattn_plan_get_info(const dattn_plan* plan, dattn_plan_info* info);
/* JSON: strategy, layout, mesh, mask, bytes of all ranks, the lower bound, the steps. Valid as long as the plan. */
DATTN_API dattn_status dattn_plan_explain(dattn_plan* plan, const char** text);
/* Proves forward and backward for all ranks (docs/ARCHITECTURE.md); DATTN_INTERNAL with what is wrong. */
DATTN_API dattn_status dattn_plan_verify(dattn_plan* plan);
/* Global positions of this rank's rows: of the queries, or with key_side of the keys. capacity >= q_rows, kv_rows. */
DATTN_API dattn_status dattn_plan_positions(const dattn_plan* plan, int32_t key_side, int64_t* positions, int64_t capacity);

/* What the planner would take for `ranks: n` and why, as JSON, without any rank. config: YAML or JSON text with shape, mesh,
 * attention, dtype, layout, strategy, objective, as of `dattn plan`. The text is the caller's, freed by dattn_text_free. */
DATTN_API dattn_status dattn_plan_query(const char* config, char** text);
DATTN_API void dattn_text_free(char* text);

/* ---- Attention -------------------------------------------------------------------------------------------------------- */

typedef struct dattn_forward {
  size_t struct_size;
  const dattn_tensor* q;    /* [B, S, H, D] */
  const dattn_tensor* k;    /* [B, T, K, D] */
  const dattn_tensor* v;    /* [B, T, K, V] */
  const dattn_tensor* bias; /* [B or 1, S, H or 1, seq_kv], where planned */
  const dattn_tensor* sink; /* [H] fp32, where planned */
  const dattn_tensor* out;  /* [B, S, H, V], written */
  const dattn_tensor*
      lse; /* [B, H, S] fp32 (fp64 for fp64), natural logarithm, -inf where nothing is seen; written; may be NULL */
  uint64_t dropout_stream; /* another one, another dropout mask: step and layer, below 2^32 */
  int64_t batch_begin;     /* global number of batch row 0, for dropout */
  int32_t layer;           /* named in errors and traces */
  void* stream;            /* CUDA: the stream that made the inputs and will read the outputs; NULL = the default stream */
} dattn_forward;

typedef struct dattn_backward {
  size_t struct_size;
  const dattn_tensor *q, *k, *v, *bias, *sink; /* as in the forward call */
  const dattn_tensor *out, *lse;               /* its results */
  const dattn_tensor* dout;                    /* [B, S, H, V] */
  const dattn_tensor *dq, *dk, *dv;            /* written, like q, k, v: storage type, or fp32 */
  const dattn_tensor* dbias; /* like bias; what batch rows or heads share is summed over those held here; may be NULL */
  const dattn_tensor* dsink; /* [H] fp32: this rank's part of the sum over sequence and batch; may be NULL */
  uint64_t dropout_stream;
  int64_t batch_begin;
  int32_t layer;
  void* stream;
} dattn_backward;

DATTN_API dattn_status dattn_attention_forward(dattn_plan* plan, const dattn_forward* args);
DATTN_API dattn_status dattn_attention_backward(dattn_plan* plan, const dattn_backward* args);

/* ---- Shards: a sequence cut by a layout ------------------------------------------------------------------------------- */

/* Which rows of an axis a rank holds; the same for every tensor cut by it: activations, ids, labels. */
typedef struct dattn_sharding dattn_sharding;

/* layout: as in dattn_attention_options; balanced needs `attention` with the mask. seq: rows of the whole axis. */
DATTN_API dattn_status dattn_sharding_create(dattn_mesh* mesh, int64_t seq, const char* layout, const char* attention,
                                             dattn_sharding** sharding);
DATTN_API void dattn_sharding_destroy(dattn_sharding* sharding);
DATTN_API int64_t dattn_sharding_rows(const dattn_sharding* sharding); /* of this rank */
DATTN_API dattn_status dattn_sharding_positions(const dattn_sharding* sharding, int64_t* positions, int64_t capacity);
/* whole -> shard: this rank's rows of `axis`. Local. Any element type of 2, 4 or 8 bytes. */
DATTN_API dattn_status dattn_shard(dattn_sharding* sharding, int32_t axis, const dattn_tensor* whole, const dattn_tensor* shard,
                                   void* stream);
/* shard -> whole: all ranks' rows, gathered over the sequence axes. Collective. */
DATTN_API dattn_status dattn_unshard(dattn_sharding* sharding, int32_t axis, const dattn_tensor* shard,
                                     const dattn_tensor* whole, void* stream);
/* whole on every rank -> shard: this rank's rows of the sum over the sequence ranks, in rank order. Collective; floating types.
 */
DATTN_API dattn_status dattn_reduce_shard(dattn_sharding* sharding, int32_t axis, const dattn_tensor* whole,
                                          const dattn_tensor* shard, void* stream);

/* ---- Decoding: keys and values of the past, spread over the mesh ------------------------------------------------------ */

typedef struct dattn_cache dattn_cache;

typedef struct dattn_cache_options {
  size_t struct_size;
  int64_t batch; /* 0 = 1 */
  int32_t layers;
  int64_t heads; /* of the whole model */
  int64_t kv_heads;
  int64_t dim;
  int64_t max_seq; /* positions the mask is made for */
  dattn_dtype dtype;
  const char* attention; /* as in dattn_attention_options, without dropout */
} dattn_cache_options;

DATTN_API dattn_status dattn_cache_create(dattn_mesh* mesh, const dattn_cache_options* options, dattn_cache** cache);
DATTN_API void dattn_cache_destroy(dattn_cache* cache);
/* Attends with the next n positions of a layer, after adding their keys and values: q [B, n, H, D], k and v [B, n, K, D] of
 * these positions, the same on all ranks of the sequence axes (with a tensor axis: this rank's heads); out [B, n, H, D] is
 * written, equal on those ranks. Prefill is a call with many positions. */
DATTN_API dattn_status dattn_cache_attend(dattn_cache* cache, int32_t layer, const dattn_tensor* q, const dattn_tensor* k,
                                          const dattn_tensor* v, const dattn_tensor* out, void* stream);
DATTN_API int64_t dattn_cache_length(const dattn_cache* cache);     /* positions held by all layers */
DATTN_API int64_t dattn_cache_local_rows(const dattn_cache* cache); /* of these, in this rank's memory */
DATTN_API dattn_status dattn_cache_clear(dattn_cache* cache);

/* NOLINTEND(modernize-use-using) */

#ifdef __cplusplus
}
#endif

#endif /* DATTN_H */
