"""A sitecustomize for a vLLM on a CPU that is to get weights by NCCL or CUDA IPC: it replaces what torch wants a GPU for.

vLLM's own code for weights by NCCL runs as it is, on tensors of the CPU; stand_in_for_nvidia.c is its libnccl and libcuda.
"""

import contextlib
import ctypes
import importlib.abc
import importlib.util
import os
import sys
from types import SimpleNamespace

PYNCCL = "vllm.distributed.device_communicators.pynccl"


class AfterImport(importlib.abc.MetaPathFinder):
    """Waits for pynccl, so that a process that never needs torch does not import it."""

    def find_spec(self, name, path, target=None):
        if name != PYNCCL:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            put_in_place(module)

        spec.loader.exec_module = exec_module
        return spec


def put_in_place(pynccl):
    import torch

    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    init = pynccl.PyNcclCommunicator._init_comm

    def init_on_cpu(communicator, _):
        # Not before: vLLM's worker for CPUs has put a stream of its own there.
        torch.cuda.current_stream = pynccl.current_stream = lambda: stream
        init(communicator, torch.device("cpu"))

    pynccl.PyNcclCommunicator._init_comm = init_on_cpu
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.device_index = lambda _: contextlib.nullcontext()


sys.meta_path.insert(0, AfterImport())
ctypes.CDLL(os.environ["VLLM_NCCL_SO_PATH"])  # whoever asks for libcuda.so.1 is given this one
