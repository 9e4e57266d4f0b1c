"""Flags with which XLA compiles small programs about four times as fast: what counts in tests."""

from importlib.metadata import version

# jax 0.11 and later do not know it, and XLA aborts at a flag that it does not know.
QUICK = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
