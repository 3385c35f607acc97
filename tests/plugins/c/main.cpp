// Tests of the C interface. The CUDA module and NCCL are the stand-ins of this build, unless the environment names others.
#include <cstdlib>

#include <gtest/gtest.h>

int main(int argc, char** argv) {
  setenv("DATTN_NCCL", DATTN_NCCL_STANDIN, 0);
  setenv("DATTN_CUDA_MODULE", DATTN_CUDA_STANDIN, 0);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
