import os

# Before JAX looks: four devices, which are the ranks. Programs are small and run once, so they are compiled in a hurry.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
                           " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
