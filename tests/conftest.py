"""Every test sees eight CPU devices, so that a mesh is real everywhere."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The second flag makes XLA compile small programs about four times as fast.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
