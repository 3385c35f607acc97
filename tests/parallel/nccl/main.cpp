// Tests of the NCCL back end. NCCL and the CUDA module are the stand-ins of this build, unless the environment names others, or
// with DATTN_TEST_DEVICE=cuda those of the machine.
#include <cstdlib>

#include <gtest/gtest.h>

int main(int argc, char** argv) {
  if (std::getenv("DATTN_TEST_DEVICE") == nullptr) {
    setenv("DATTN_NCCL", DATTN_NCCL_STANDIN, 0);
    setenv("DATTN_CUDA_MODULE", DATTN_CUDA_STANDIN, 0);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
