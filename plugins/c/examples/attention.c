/* One causal attention over four ranks, forward and backward: each rank brings its shard of q, k, v and gets its rows of the
 * result. The ranks are threads of this program; with dattn_comm_mpi in place of dattn_comm_threads they are MPI processes.
 *
 *   cc -std=c99 attention.c $(pkg-config --cflags --libs dattn) -lm -lpthread && ./a.out
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "dattn.h"

enum { RANKS = 4, BATCH = 1, SEQ = 300, HEADS = 4, KV_HEADS = 2, DIM = 32 };

static void check(dattn_status status, const char* what) {
  if (status == DATTN_OK) return;
  fprintf(stderr, "%s: %s\n", what, dattn_last_error());
  exit((int)status);
}

static const dattn_dtype FP32 = {DATTN_FLOAT, 32, 1};

/* A tensor of [a, b, c, d], or of [a, b, c] where d is 0, with memory of its own. */
typedef struct owned {
  int64_t shape[4];
  dattn_tensor tensor;
} owned;

static void make(owned* made, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t shape[4] = {a, b, c, d};
  int i;
  for (i = 0; i < 4; ++i) made->shape[i] = shape[i];
  made->tensor.device.type = DATTN_CPU;
  made->tensor.device.index = 0;
  made->tensor.ndim = d > 0 ? 4 : 3;
  made->tensor.dtype = FP32;
  made->tensor.shape = made->shape;
  made->tensor.strides = NULL;
  made->tensor.byte_offset = 0;
  made->tensor.data = calloc((size_t)(a * b * c * (d > 0 ? d : 1)), sizeof(float));
}

/* Numbers that depend on the global position, so that every mesh computes the same attention. */
static void fill(owned* made, const int64_t* positions, int which) {
  float* next = made->tensor.data;
  int64_t row, head, i;
  for (row = 0; row < made->shape[1]; ++row)
    for (head = 0; head < made->shape[2]; ++head)
      for (i = 0; i < made->shape[3]; ++i) *next++ = (float)sin((double)(positions[row] * 7 + head * 5 + i * 3 + which));
}

typedef struct rank {
  pthread_t thread;
  dattn_comm* comm;
  double sum, gradient_sum;
} rank;

static double sum_of(const owned* made) {
  const float* values = made->tensor.data;
  const int64_t count = made->shape[0] * made->shape[1] * made->shape[2] * made->shape[3];
  double sum = 0;
  int64_t i;
  for (i = 0; i < count; ++i) sum += fabs((double)values[i]);
  return sum;
}

static void* run(void* given) {
  rank* mine = given;
  dattn_mesh* mesh;
  dattn_plan* plan;
  dattn_mesh_options axes = {sizeof axes};
  dattn_attention_options options = {sizeof options};
  dattn_plan_info info = {sizeof info};
  dattn_forward forward = {sizeof forward};
  dattn_backward backward = {sizeof backward};
  owned q, k, v, out, lse, dout, dq, dk, dv;
  int64_t* positions;

  axes.ring = dattn_comm_size(mine->comm) / 2;
  axes.ulysses = dattn_comm_size(mine->comm) / (axes.ring > 0 ? axes.ring : 1);
  check(dattn_mesh_create(mine->comm, &axes, &mesh), "mesh");

  options.batch = BATCH;
  options.seq_q = SEQ;
  options.heads = HEADS;
  options.kv_heads = KV_HEADS;
  options.dim_qk = DIM;
  options.dtype = FP32;
  options.attention = "{mask: {kind: causal}}";
  check(dattn_plan_create(mesh, &options, &plan), "plan");
  check(dattn_plan_get_info(plan, &info), "info");

  positions = malloc((size_t)(info.q_rows + 1) * sizeof *positions);
  check(dattn_plan_positions(plan, 0, positions, info.q_rows), "positions");
  make(&q, BATCH, info.q_rows, HEADS, DIM);
  make(&k, BATCH, info.kv_rows, KV_HEADS, DIM);
  make(&v, BATCH, info.kv_rows, KV_HEADS, DIM);
  make(&dout, BATCH, info.q_rows, HEADS, DIM);
  fill(&q, positions, 0);
  fill(&k, positions, 1);
  fill(&v, positions, 2);
  fill(&dout, positions, 3);
  make(&out, BATCH, info.q_rows, HEADS, DIM);
  make(&lse, BATCH, HEADS, info.q_rows, 0);
  make(&dq, BATCH, info.q_rows, HEADS, DIM);
  make(&dk, BATCH, info.kv_rows, KV_HEADS, DIM);
  make(&dv, BATCH, info.kv_rows, KV_HEADS, DIM);

  forward.q = backward.q = &q.tensor;
  forward.k = backward.k = &k.tensor;
  forward.v = backward.v = &v.tensor;
  forward.out = backward.out = &out.tensor;
  forward.lse = backward.lse = &lse.tensor;
  check(dattn_attention_forward(plan, &forward), "forward");
  backward.dout = &dout.tensor;
  backward.dq = &dq.tensor;
  backward.dk = &dk.tensor;
  backward.dv = &dv.tensor;
  check(dattn_attention_backward(plan, &backward), "backward");
  mine->sum = sum_of(&out);
  mine->gradient_sum = sum_of(&dq) + sum_of(&dk) + sum_of(&dv);

  free(positions);
  free(q.tensor.data), free(k.tensor.data), free(v.tensor.data), free(out.tensor.data), free(lse.tensor.data);
  free(dout.tensor.data), free(dq.tensor.data), free(dk.tensor.data), free(dv.tensor.data);
  dattn_plan_destroy(plan);
  dattn_mesh_destroy(mesh);
  dattn_comm_destroy(mine->comm);
  return NULL;
}

static void attend(dattn_context* context, int count, double* sum, double* gradient_sum) {
  dattn_comm* comms[RANKS];
  rank ranks[RANKS];
  int r;
  check(dattn_comm_threads(context, count, NULL, comms), "communicators");
  for (r = 0; r < count; ++r) {
    ranks[r].comm = comms[r];
    pthread_create(&ranks[r].thread, NULL, run, &ranks[r]);
  }
  *sum = *gradient_sum = 0;
  for (r = 0; r < count; ++r) {
    pthread_join(ranks[r].thread, NULL);
    *sum += ranks[r].sum;
    *gradient_sum += ranks[r].gradient_sum;
  }
}

int main(void) {
  dattn_context* context;
  double alone[2], spread[2];
  check(dattn_context_create(NULL, &context), "context");
  attend(context, 1, &alone[0], &alone[1]);
  attend(context, RANKS, &spread[0], &spread[1]);
  dattn_context_destroy(context);
  printf("sum of |out|: %.6f on one rank, %.6f on %d\n", alone[0], spread[0], RANKS);
  printf("sum of |dq|, |dk|, |dv|: %.6f on one rank, %.6f on %d\n", alone[1], spread[1], RANKS);
  return fabs(alone[0] / spread[0] - 1) < 1e-5 && fabs(alone[1] / spread[1] - 1) < 1e-5 ? 0 : 1;
}
