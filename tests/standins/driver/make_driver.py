"""Writes the source of a stand-in for NVIDIA's driver library: every function that the toolkit's stub of libcuda.so.1 has,
so that libraries can load kernels and plan with them where there is no GPU.

usage: make_driver.py STUB SOURCE

Functions that load code or look into it succeed (cuLibrary*, cuKernel*, cuModule*, cuFunc*); those that hand something out
hand out one dummy. All others say that there is no device.
"""
import re
import subprocess
import sys

HEAD = """// Made by make_driver.py from the toolkit's stub of the driver.
#include <dlfcn.h>
#include <stdint.h>

static char dummy[4096];

int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  (void)version, (void)flags;
  void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *function = self ? dlsym(self, name) : 0;
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""
WRITTEN = {"cuDriverGetVersion", "cuGetProcAddress", "cuGetProcAddress_v2"}
OF_CODE = re.compile("cu(Library|Kernel|Module|Func)")
HANDS_OUT = re.compile("Load|Get(Kernel|Module|Function|UnifiedFunction)$")


def definition(name):
    if not OF_CODE.match(name):
        return f"int {name}(void) {{ return 100; }}"  # CUDA_ERROR_NO_DEVICE
    if HANDS_OUT.search(name):
        return f"int {name}(void** out) {{ *out = dummy; return 0; }}"
    if name.endswith("GetAttribute"):
        return f"int {name}(int* value) {{ *value = 0; return 0; }}"
    return f"int {name}(void) {{ return 0; }}"


def main():
    stub, source = sys.argv[1:]
    listing = subprocess.run(["nm", "-D", "--defined-only", stub], check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in listing.splitlines() if " T " in line]
    with open(source, "w", encoding="utf-8") as file:
        file.write(HEAD)
        file.writelines(definition(name) + "\n" for name in names if name not in WRITTEN)


main()
