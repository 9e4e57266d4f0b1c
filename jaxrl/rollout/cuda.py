"""CUDA's driver through ctypes, after cuda.h: contexts, streams, and memory that two processes share.

The standard library alone: the trainer and vLLM's workers call it. The driver, and not the runtime, of which each library
(JAX, NCCL, torch) has a copy of its own: they all work in the driver's primary context of a device, and find it where
it is current. Seen to run against a stand-in alone (tests/stand_in_for_nvidia.c), on no GPU.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

NOT_READY = 600  # CUDA_ERROR_NOT_READY
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it waits for no other stream
PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
HANDLE_BYTES = 64


class CudaError(RuntimeError):
    pass


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


_PTR, _INT, _UINT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
FUNCTIONS = {
    "cuInit": [_UINT],
    "cuDeviceGet": [_PTR, _INT],
    "cuDevicePrimaryCtxRetain": [_PTR, _INT],
    "cuCtxSetCurrent": [_PTR],
    "cuStreamCreate": [_PTR, _UINT],
    "cuStreamQuery": [_PTR],
    "cuStreamSynchronize": [_PTR],
    "cuStreamDestroy_v2": [_PTR],
    "cuMemAlloc_v2": [_PTR, _SIZE],
    "cuMemFree_v2": [_PTR],
    "cuMemcpyDtoD_v2": [_PTR, _PTR, _SIZE],
    "cuIpcGetMemHandle": [_PTR, _PTR],
    "cuIpcOpenMemHandle_v2": [_PTR, _Handle, _UINT],
}


@cache
def driver() -> Any:
    """libcuda, ready. Raises ValueError where there is no GPU for it."""
    try:
        library = typed(ctypes.CDLL("libcuda.so.1"), FUNCTIONS)
        if result := library.cuInit(0):
            raise OSError(f"cuInit gave {result}")
    except OSError as error:
        raise ValueError(f"there is no GPU of NVIDIA's here: set rollout.vllm.transport to auto ({error})") from None
    return library


def typed(library: Any, functions: dict[str, list[Any]]) -> Any:
    for name, arguments in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _INT
    return library


def call(name: str, *arguments: Any) -> None:
    if result := getattr(driver(), name)(*arguments):
        raise CudaError(f"CUDA's driver failed: {name} gave {result}")


class Context:
    """The primary one of a device, by the number that CUDA has for it."""

    def __init__(self, device: int):
        handle, self._context = _INT(), _PTR()
        call("cuDeviceGet", ctypes.byref(handle), device)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)

    def enter(self) -> None:
        """Make it this thread's."""
        call("cuCtxSetCurrent", self._context)


class Stream:
    """Of the context of this thread."""

    def __init__(self):
        self.handle = _PTR()
        call("cuStreamCreate", ctypes.byref(self.handle), NON_BLOCKING)

    def is_idle(self) -> bool:
        result = driver().cuStreamQuery(self.handle)
        if result not in (0, NOT_READY):
            raise CudaError(f"CUDA's driver failed: cuStreamQuery gave {result}")
        return result == 0

    def destroy(self) -> None:
        driver().cuStreamDestroy_v2(self.handle)


class SharedBuffer:
    """Memory of a device that another process opens by `handle`. Of the driver itself, as of JAX's own no handle may be had."""

    def __init__(self, context: Context, size: int):
        self.size, self._context, self._address = size, context, _PTR()
        self._lock = threading.Lock()  # between `free` and `fill`
        handle = _Handle()
        context.enter()
        call("cuMemAlloc_v2", ctypes.byref(self._address), size)
        call("cuIpcGetMemHandle", ctypes.byref(handle), self._address)
        self.handle = bytes(handle)

    def fill(self, place: int, address: int, size: int) -> None:
        """Copy what lies at an address to a place here; it is there when this returns."""
        with self._lock:
            if self._address.value is None:
                raise CudaError("a buffer that was given back is not filled any more")
            self._context.enter()
            call("cuMemcpyDtoD_v2", self._address.value + place, address, size)
            call("cuStreamSynchronize", None)

    def free(self) -> None:
        with self._lock:
            self._context.enter()
            call("cuMemFree_v2", self._address)
            self._address = _PTR()


class OpenedBuffer:
    """A `SharedBuffer` in another process, in the context of this thread."""

    def __init__(self, handle: bytes):
        address = _PTR()
        call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), PEER_ACCESS)
        assert address.value is not None
        self._address = address.value

    def take(self, place: int, address: int, size: int) -> None:
        """Copy what lies at a place there to an address; it is there when this returns."""
        call("cuMemcpyDtoD_v2", address, self._address + place, size)
        call("cuStreamSynchronize", None)
