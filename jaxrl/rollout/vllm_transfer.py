"""One version of the weights that goes from the trainer's devices to those of the servers, and through no file.

A server is asked whether the version fits, then it receives tensor after tensor while this side makes each, whole and
in the server's dtype, on its first device: by NCCL, in a group with the workers of the server (nccl.py), or on the same
device through a buffer that both see (cuda.py); either is made at a server's first load after each start. Nothing of the
version stays. A server that is started again is sent it anew from the trainer's arrays, as long as these are lent: while
the engine answers, takes new weights or goes to sleep (`Pool.hold`).
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..models.config import ModelConfig
from ..weights.export import device_tensors
from ..weights.safetensors_writer import dtype_named
from ..weights.sync import SPELLINGS
from . import cuda, nccl
from .protocol import Manifest, Tensor, not_finite
from .vllm_client import Client, ServerLost
from .vllm_pool import Server

Tree = Any
T = TypeVar("T")
PORTION = 64 << 20  # bytes of a buffer that two processes see
ABORT_S = 10.0  # so long it is waited for the end of a group that failed


class Devices:
    """The trainer's, of which the first one sends. Raises ValueError where this host lacks what `transport` needs."""

    def __init__(self, mesh: Mesh, transport: str, *, timeout_s: float):
        cuda.driver()
        if transport == "nccl":
            nccl.version()
        self.first, self.timeout_s = mesh.devices.flat[0], timeout_s
        self._gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
        # Two programs at a time on several devices could wait for each other for ever.
        self._lock = threading.Lock()

    def whole(self, tensors: Iterator[tuple[str, jax.Array]]) -> Iterator[jax.Array]:
        """Each of the tensors, whole on the first device and ready; it is made when it is asked for."""
        while True:
            with self._lock:
                if (found := next(tensors, None)) is None:
                    return
                shards = self._gathered(found[1]).block_until_ready().addressable_shards
            yield next(shard.data for shard in shards if shard.device == self.first)


class Group:
    """A group of NCCL with the workers of one server, for as long as these live."""

    def __init__(self, communicator: nccl.Communicator):
        self.communicator = communicator

    @classmethod
    async def joined(cls, client: Client, devices: Devices) -> Group:
        found, ours = await client.nccl(), nccl.version()
        if found["version"] != ours:  # which NCCL too would refuse, in its log
            raise ValueError(
                f"its NCCL is {found['version']} and the trainer's {ours}, which must be equal: install the same "
                "nvidia-nccl wheel on both sides, or name one library in VLLM_NCCL_SO_PATH for both"
            )
        num_ranks, timeout_s = 1 + found["num_workers"], devices.timeout_s
        communicator = await _beside(lambda: nccl.Communicator(devices.first.local_hardware_id, num_ranks))

        def join() -> None:
            zero = jax.device_put(np.zeros(1, np.float32), devices.first).block_until_ready()
            communicator.begin(timeout_s)
            communicator.join(zero.unsafe_buffer_pointer())

        group = cls(communicator)
        await group.together(client.join(communicator.unique_id, num_ranks, timeout_s=timeout_s), join)
        return group

    async def together(self, theirs: Awaitable[T], ours: Callable[[], None]) -> T:
        """What the server answers to `theirs`, while `ours` runs in a thread. Where one of them fails the group ends, so
        that the other one does not wait on."""
        asked, done = asyncio.ensure_future(theirs), _beside(ours)
        try:
            await asyncio.wait({asked, done}, return_when=asyncio.FIRST_EXCEPTION)
            for part in (asked, done):
                if part.done():
                    part.result()
            return asked.result()
        except BaseException:
            asked.cancel()
            await asyncio.gather(asked, self.end(), asyncio.wait({done}, timeout=ABORT_S), return_exceptions=True)
            raise

    async def end(self) -> None:
        await asyncio.wait({_beside(self.communicator.abort)}, timeout=ABORT_S)


class Shared:
    """A buffer on the first device that the workers of one server have opened."""

    def __init__(self, buffer: cuda.SharedBuffer):
        self.buffer = buffer

    async def end(self) -> None:
        await asyncio.wait({_beside(self.buffer.free)}, timeout=ABORT_S)


class Transfer(ABC):
    """`variables` on the devices as one version, in `dtype`. Raises Refused where there is NaN or infinity among them."""

    is_adapter = False

    def __init__(
        self, run: str, version: int, variables: Tree, config: ModelConfig, dtype: str, *,
        probe_ids: list[int], probe_logprobs: list[float], devices: Devices,
    ):  # fmt: skip
        self.probe_ids, self.probe_logprobs = probe_ids, probe_logprobs
        self.num_bytes = 0
        self._variables, self._config, self._dtype, self._devices = variables, config, dtype_named(dtype), devices
        looked_at = jax.device_get([(name, x.shape, _looked_at(x)) for name, x in self._tensors()])
        tensors = []
        for name, shape, (checksum, is_finite) in looked_at:
            if not is_finite:
                raise not_finite(version, name)
            tensors.append(Tensor(name, shape, SPELLINGS[dtype], int(checksum)))
        self.manifest = Manifest(run, version, tuple(tensors))
        self.label = self.manifest.label

    async def place(self, server: Server) -> None:  # noqa: B027 - that it does nothing is the point
        """Nothing lies anywhere before the load."""

    async def load(self, server: Server) -> dict[str, Any]:
        assert server.client is not None
        await server.client.fits(self.manifest)
        try:
            answer = await self._send(server, server.client)
        except (nccl.NcclError, cuda.CudaError) as error:
            raise ServerLost(str(error)) from None
        self.num_bytes += self.manifest.nbytes
        return answer

    def anew(self, server: Server) -> None:  # noqa: B027
        """It is sent at every load."""

    @abstractmethod
    async def _send(self, server: Server, client: Client) -> dict[str, Any]:
        """Bring all tensors to a server that wants them; what it says of the load."""

    def _tensors(self) -> Iterator[tuple[str, jax.Array]]:
        v = self._variables
        return device_tensors(v["params"], self._config, lora=v.get("lora"), packed=v.get("packed"), dtype=self._dtype)

    def _whole(self) -> Iterator[tuple[Tensor, jax.Array]]:
        """Each tensor whole on the first device and ready, made when it is asked for."""
        for tensor, array in zip(self.manifest.tensors, self._devices.whole(self._tensors()), strict=True):
            assert (array.shape, array.dtype) == (tensor.shape, self._dtype), tensor.name
            yield tensor, array


class ByNccl(Transfer):
    """To servers on other devices."""

    async def _send(self, server: Server, client: Client) -> dict[str, Any]:
        group = server.channel
        if group is None:
            group = server.channel = await Group.joined(client, self._devices)
        assert isinstance(group, Group)
        receiving = client.receive(self.manifest, timeout_s=self._devices.timeout_s)
        return await group.together(receiving, lambda: self._broadcast(group.communicator))

    def _broadcast(self, communicator: nccl.Communicator) -> None:
        """Each tensor is made while the one before it is on its way."""
        communicator.begin(self._devices.timeout_s)
        what, on_its_way = "", None
        for tensor, array in self._whole():
            if on_its_way is not None:
                communicator.wait(what)
            what, on_its_way = f"the server to take {tensor.name} of version {self.manifest.version}", array
            communicator.broadcast(array.unsafe_buffer_pointer(), array.size, tensor.dtype, what)
        communicator.wait(what)
        del on_its_way


class ByIpc(Transfer):
    """To servers on the same device: through a buffer that both see, one portion after the other."""

    async def _send(self, server: Server, client: Client) -> dict[str, Any]:
        timeout_s = self._devices.timeout_s
        try:
            return await asyncio.wait_for(self._in_portions(server, client), timeout_s)
        except TimeoutError:
            raise ServerLost(
                f"it was waited for {timeout_s:.0f} s (rollout.vllm.load_timeout_s) for it to take version "
                f"{self.manifest.version} of the weights in vain"
            ) from None

    async def _in_portions(self, server: Server, client: Client) -> dict[str, Any]:
        shared = server.channel
        if shared is None:
            device = self._devices.first.local_hardware_id
            buffer = await _to_its_end(_beside(lambda: cuda.SharedBuffer(cuda.Context(device), PORTION)))
            shared = server.channel = Shared(buffer)
            await client.open(buffer.handle)
        assert isinstance(shared, Shared)
        portions, is_first = self._portions(shared.buffer), True
        while (pieces := await _to_its_end(_beside(lambda: next(portions, None)))) is not None:
            await client.portion(self.manifest if is_first else None, pieces)
            is_first = False
        return await client.finish(self.manifest)

    def _portions(self, buffer: cuda.SharedBuffer) -> Iterator[list[tuple[int, int, int, int]]]:
        """What the buffer holds: number of the tensor, place in it, place in the buffer, bytes. Taken before the next."""
        pieces, place = [], 0
        for number, (tensor, array) in enumerate(self._whole()):
            start = 0
            while start < tensor.nbytes:
                size = min(buffer.size - place, tensor.nbytes - start)
                buffer.fill(place, array.unsafe_buffer_pointer() + start, size)
                pieces.append((number, start, place, size))
                start, place = start + size, place + size
                if place == buffer.size:
                    yield pieces
                    pieces, place = [], 0
        if pieces:
            yield pieces


@jax.jit
def _looked_at(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A checksum of the bits of all numbers and their places, and whether all are finite.

    The sum of MurmurHash3's fmix32 of each: on every mesh the same, and nothing that training does cancels out.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    h = bits ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return (h ^ (h >> 16)).sum(dtype=jnp.uint32), jnp.isfinite(x).all()


async def _to_its_end(done: asyncio.Future[T]) -> T:
    """The result; where it is no longer wanted, when the thread works on no array any more."""
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.wait({done}, timeout=ABORT_S)
        raise


def _beside(work: Callable[[], T]) -> asyncio.Future[T]:
    """In a thread that does not hold up the end of the program: whatever a GPU does, nobody waits for it for ever."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="transfer").start()
    result = asyncio.wrap_future(done)
    result.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asks gets it
    return result


TRANSFERS = {"nccl": ByNccl, "ipc": ByIpc}
