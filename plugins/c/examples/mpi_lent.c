/* A program that runs MPI itself and lends dattn a communicator of its own: here the ranks of even and of odd number form a
 * group each, and every group computes the same attention over a ring of its ranks.
 *
 *   mpicc -std=c99 mpi_lent.c $(pkg-config --cflags --libs dattn) -lm && mpirun -np 4 ./a.out
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <mpi.h>

#include "dattn.h"

enum { SEQ = 50, HEADS = 2, DIM = 16 };

static void check(dattn_status status, const char* what) {
  if (status == DATTN_OK) return;
  fprintf(stderr, "%s: %s\n", what, dattn_last_error());
  MPI_Abort(MPI_COMM_WORLD, (int)status);
}

static dattn_tensor tensor_of(float* data, int64_t* shape) {
  dattn_tensor made = {0};
  made.data = data;
  made.device.type = DATTN_CPU;
  made.ndim = 4;
  made.dtype.code = DATTN_FLOAT;
  made.dtype.bits = 32;
  made.dtype.lanes = 1;
  made.shape = shape;
  return made;
}

/* Sum of this group's results over all of its rows. */
static double attend(MPI_Comm group) {
  dattn_context* context;
  dattn_comm* comm;
  dattn_mesh* mesh;
  dattn_plan* plan;
  dattn_mesh_options axes = {sizeof axes};
  dattn_attention_options options = {sizeof options};
  dattn_plan_info info = {sizeof info};
  dattn_forward call = {sizeof call};
  int64_t shape[4] = {1, 0, HEADS, DIM}, positions[SEQ], row, i;
  float *in, *out;
  dattn_tensor q, result;
  double mine = 0, sum = 0;

  check(dattn_context_create(NULL, &context), "context");
  check(dattn_comm_mpi(context, &group, NULL, &comm), "communicator");
  axes.ring = dattn_comm_size(comm);
  check(dattn_mesh_create(comm, &axes, &mesh), "mesh");
  options.batch = 1;
  options.seq_q = SEQ;
  options.heads = HEADS;
  options.dim_qk = DIM;
  options.dtype.code = DATTN_FLOAT;
  options.dtype.bits = 32;
  options.dtype.lanes = 1;
  check(dattn_plan_create(mesh, &options, &plan), "plan");
  check(dattn_plan_get_info(plan, &info), "info");
  check(dattn_plan_positions(plan, 0, positions, SEQ), "positions");

  shape[1] = info.q_rows;
  in = malloc(sizeof(float) * (size_t)(info.q_rows * HEADS * DIM + 1));
  out = malloc(sizeof(float) * (size_t)(info.q_rows * HEADS * DIM + 1));
  for (row = 0; row < info.q_rows; ++row)
    for (i = 0; i < HEADS * DIM; ++i) in[row * HEADS * DIM + i] = (float)sin((double)(positions[row] * 3 + i));
  q = tensor_of(in, shape);
  result = tensor_of(out, shape);
  call.q = call.k = call.v = &q;
  call.out = &result;
  check(dattn_attention_forward(plan, &call), "forward");
  for (i = 0; i < info.q_rows * HEADS * DIM; ++i) mine += fabs((double)out[i]);
  MPI_Allreduce(&mine, &sum, 1, MPI_DOUBLE, MPI_SUM, group);

  free(in);
  free(out);
  dattn_plan_destroy(plan);
  dattn_mesh_destroy(mesh);
  dattn_comm_destroy(comm);
  dattn_context_destroy(context);
  return sum;
}

int main(int argc, char** argv) {
  int rank, provided, finalised;
  double sum, least, most;
  MPI_Comm group;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_split(MPI_COMM_WORLD, rank % 2, rank, &group);
  sum = attend(group);
  MPI_Finalized(&finalised); /* the host's to do */
  MPI_Allreduce(&sum, &least, 1, MPI_DOUBLE, MPI_MIN, MPI_COMM_WORLD);
  MPI_Allreduce(&sum, &most, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  if (rank == 0) printf("sum of |out| of the groups: %.6f and %.6f\n", least, most);
  MPI_Comm_free(&group);
  MPI_Finalize();
  return finalised == 0 && most - least < 1e-3 * most ? 0 : 1;
}
