"""NCCL without torch: this process as rank 0 of a group whose other ranks are the workers of one vLLM server.

Through ctypes, after nccl.h. The communicator is a non-blocking one (nccl.h: `blocking = 0`): no call waits,
so that each wait is a loop of ours, which has a time limit and can be ended from another thread. JAX shares nothing with
it but addresses: an array is ready before its address is given here, and lives until `wait` has returned.

Seen to run against a stand-in alone (tests/stand_in_for_nvidia.c), on no GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .cuda import Context, Stream, typed

POLL_S = 0.0002
ID_BYTES = 128
SUCCESS, IN_PROGRESS = 0, 7  # ncclResult_t
SUM, FLOAT32 = 0, 7  # ncclRedOp_t, ncclDataType_t
DTYPES = {"F16": 6, "F32": FLOAT32, "BF16": 9}  # as safetensors spells them
ROOT = 0


class NcclError(RuntimeError):
    """A group that is of no use any more; the message says why."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t as it was in version 2.14: a later NCCL takes its own defaults for all that came after that."""

    _fields_ = (
        ("size", ctypes.c_size_t), ("magic", ctypes.c_uint), ("version", ctypes.c_uint), ("blocking", ctypes.c_int),
    )  # fmt: skip


_PTR, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
FUNCTIONS = {
    "ncclGetVersion": [_PTR],
    "ncclGetUniqueId": [_PTR],
    "ncclCommInitRankConfig": [_PTR, _INT, _UniqueId, _INT, _PTR],
    "ncclCommGetAsyncError": [_PTR, _PTR],
    "ncclCommAbort": [_PTR],
    "ncclAllReduce": [_PTR, _PTR, _SIZE, _INT, _INT, _PTR, _PTR],
    "ncclBroadcast": [_PTR, _PTR, _SIZE, _INT, _INT, _PTR, _PTR],
}


@cache
def nccl() -> Any:
    """libnccl: VLLM_NCCL_SO_PATH (which vLLM reads too), that of the wheel that jax[cuda] installs, or the system's."""
    try:
        library = typed(ctypes.CDLL(_nccl_path()), FUNCTIONS)
    except (OSError, AttributeError) as error:  # AttributeError: it is older than 2.14
        raise ValueError(
            "rollout.vllm.transport nccl needs NCCL 2.14 or newer: install the wheel nvidia-nccl-cu12 or -cu13, or name it in "
            f"VLLM_NCCL_SO_PATH ({error})"
        ) from None
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclGetErrorString.argtypes = [_INT]
    return library


def _nccl_path() -> str:
    if named := os.environ.get("VLLM_NCCL_SO_PATH"):
        return named
    spec = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nccl")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    paths = [Path(folder) / "lib" / "libnccl.so.2" for folder in folders]
    return next((str(path) for path in paths if path.exists()), "libnccl.so.2")


def version() -> int:
    """As 22907, for 2.29.7."""
    found = _INT()
    _done(nccl().ncclGetVersion(ctypes.byref(found)), "its version")
    return found.value


def _done(result: int, what: str) -> None:
    if result not in (SUCCESS, IN_PROGRESS):
        raise NcclError(f"NCCL failed at {what}: {nccl().ncclGetErrorString(result).decode()}")


class Communicator:
    """One group: `join` it, then any number of `broadcast` and `wait`, each stretch of them in one thread after `begin`.

    `abort`, from any thread at any time, ends it. Whoever waits raises NcclError then, as where the time is over and where
    NCCL has noticed that another rank is gone.
    """

    def __init__(self, device: int, num_ranks: int):
        """`device` is CUDA's number of it."""
        self._num_ranks = num_ranks
        self._context = Context(device)
        self._context.enter()
        self._stream = Stream()
        self._id, self._comm = _UniqueId(), _PTR()
        self._lock = threading.Lock()  # between `abort`, which frees the communicator, and all that uses it
        self._is_aborted = False
        self._timeout_s, self._deadline = 0.0, 0.0
        _done(nccl().ncclGetUniqueId(ctypes.byref(self._id)), "an id for a group")

    @property
    def unique_id(self) -> bytes:
        """What the other ranks need to join."""
        return bytes(self._id)

    def begin(self, timeout_s: float) -> None:
        """What follows is done in this thread, and within this time."""
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._context.enter()  # whose device NCCL takes

    def join(self, zero: int) -> None:
        """Until all ranks are there. At the address `zero` the device has a float32 that is overwritten.

        A sum over one number is vLLM's handshake (PyNcclCommunicator.from_unique_id_bytes).
        """
        what = "the workers of the server to join a group of NCCL"
        config = ctypes.byref(_Config(ctypes.sizeof(_Config), 0xCAFEBEEF, 21400, 0))
        with self._using(what):
            comm = ctypes.byref(self._comm)
            _done(nccl().ncclCommInitRankConfig(comm, self._num_ranks, self._id, ROOT, config), what)
        self._until(self._is_settled, what)
        with self._using(what):
            _done(nccl().ncclAllReduce(zero, zero, 1, FLOAT32, SUM, self._comm, self._stream.handle), what)
        self._until(self._is_settled, what)
        self.wait(what)

    def broadcast(self, address: int, count: int, dtype: str, what: str) -> None:
        """Begin to send the `count` numbers that lie at an address on the device."""
        with self._using(what):
            code = DTYPES[dtype]
            _done(nccl().ncclBroadcast(address, address, count, code, ROOT, self._comm, self._stream.handle), what)
        self._until(self._is_settled, what)

    def wait(self, what: str) -> None:
        """Until what was begun has arrived."""
        self._until(self._is_idle, what)

    def abort(self) -> None:
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
            if self._comm:
                nccl().ncclCommAbort(self._comm)
            self._context.enter()
            self._stream.destroy()

    @contextmanager
    def _using(self, what: str) -> Iterator[None]:
        with self._lock:
            if self._is_aborted:
                raise NcclError(f"it was no longer waited for {what}")
            yield

    def _is_settled(self, what: str) -> bool:
        """Whether the last call has done all but what the device does."""
        state = _INT()
        _done(nccl().ncclCommGetAsyncError(self._comm, ctypes.byref(state)), what)
        _done(state.value, what)
        return state.value == SUCCESS

    def _is_idle(self, what: str) -> bool:
        self._is_settled(what)  # raises where another rank is gone
        return self._stream.is_idle()

    def _until(self, is_done: Callable[[str], bool], what: str) -> None:
        while True:
            with self._using(what):
                if is_done(what):
                    return
            if time.monotonic() > self._deadline:
                raise NcclError(
                    f"it was waited for {self._timeout_s:.0f} s (rollout.vllm.load_timeout_s) for {what} in vain"
                )
            time.sleep(POLL_S)
