"""The engine that is a vLLM sidecar: servers in processes of their own, which answer with the weights we publish.

Here is the trainer's side of it in four verbs. `weights/sync.py` turns weights into bytes, `vllm_pool.py` keeps the
servers, on an event loop in a thread of its own. Of several processes the first one talks to the servers, and the
others are given what it got.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..batch import Prompt, Rollout
from ..config import VllmSection
from ..link import Link
from ..models.config import ModelConfig
from ..models.decoder import head_bias, head_table, hidden_states
from ..models.logprobs import target_logprobs
from ..parallel import fetch, num_row_shards, put_rows, use_mesh
from ..weights.convert import convert
from ..weights.locate import resolve
from ..weights.pretrained import Pretrained
from ..weights.source import Options
from ..weights.sync import Export, SharedFolder, adapter_export, model_export, served_folder
from .engine import Report, Sampling, check_prompt
from .vllm_adapter import NCCL_ARGS, ServerSpec
from .vllm_client import ServerLost
from .vllm_pool import DEAD, STARTING, Pool, Server
from .vllm_process import ServerProcess
from .vllm_publication import Publication
from .vllm_requests import Job, answer
from .vllm_transfer import TRANSFERS, Devices, Transfer

Tree = Any
T = TypeVar("T")
PROBE_TOKENS, SPLASH_COLUMNS = 32, 128  # columns: what the TPU's attention kernel wants


class VllmEngine:
    """`source` is the model that training began from, `folder` where logs and the like of the servers lie. `sleeps`: the
    servers share the trainer's devices, and are asked to `sleep` while it needs all of their memory.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, settings: VllmSection, *,
        source: Pretrained, folder: Path, max_model_len: int, max_num_seqs: int, link: Link | None = None,
        sleeps: bool = False,
    ):  # fmt: skip
        self.sleeps = sleeps
        self.config, self.mesh, self.settings, self.source = config, mesh, settings, source
        self.max_model_len = max_model_len
        self.folder = folder
        self.run = secrets.token_hex(6)
        self.version = -1
        self._link = Link() if link is None else link
        self._publication: Publication | Transfer | None = None
        self._folders: dict[str, Path] = {}  # in which it lies, by transport
        self._here = "shm"  # where a file for servers on this host lies: shm, or disk
        self._uploads: list[Server] = []  # to whom it is sent
        self._forgetting: threading.Thread | None = None
        self._probe_logprobs = jax.jit(partial(_probe_logprobs, config))
        self._devices: Devices | None = None  # from which weights go without a file
        if settings.transport in TRANSFERS:
            if self._link.num_processes > 1:
                raise ValueError(
                    f"rollout.vllm.transport {settings.transport} sends from the devices of one process, and the run has "
                    f"{self._link.num_processes}: set it to auto"
                )
            self._devices = Devices(mesh, settings.transport, timeout_s=settings.load_timeout_s)
        num = min(PROBE_TOKENS, max_model_len - 1)
        self.probe_ids = np.random.default_rng(0).integers(0, config.vocab_size, num).tolist()
        if not self._link.is_first:
            return
        self._shared: SharedFolder | None = None
        self.pool = Pool(self._servers(max_num_seqs), settings, max_num_seqs=max_num_seqs)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="vllm")
        self._thread.start()
        self._call(self.pool.open())  # they start while the trainer goes on

    def _servers(self, max_num_seqs: int) -> list[Server]:
        v = self.settings
        if v.urls:
            key = os.environ.get("VLLM_API_KEY", "")
            return [Server(f"server {url}", key, url, None) for url in v.urls]
        servers, key, model = [], secrets.token_urlsafe(24), self._model_to_serve()
        for i in range(v.num_servers):
            visible = {"CUDA_VISIBLE_DEVICES": v.devices[i]} if v.devices else {}
            spec = ServerSpec(
                model=model, host="127.0.0.1", port=0, folder=str((self.folder / f"server_{i}").resolve()),
                dtype=v.dtype, max_model_len=self.max_model_len, max_num_seqs=max_num_seqs,
                gpu_memory_utilization=v.gpu_memory_utilization, env={**v.env, **visible},
                args=(NCCL_ARGS if v.transport == "nccl" else {}) | v.args,
                lora_rank=self.config.lora_rank if v.publish == "adapter" else 0, sleeps=self.sleeps,
            )  # fmt: skip
            assert v.python is not None
            servers.append(Server(f"server {i}", key, None, ServerProcess(v.python, spec, key)))
        return servers

    def _model_to_serve(self) -> str:
        """The folder that servers are started with: without weights, which come from us, or the base of adapters."""
        if self.settings.publish == "merged":
            return str(served_folder(self.config, self.source, self.folder / "model").resolve())
        base = resolve(self.source.base)
        if self.config.packed is not None:  # vLLM reads no bitsandbytes
            packed, base = base, self.folder / "base"
            if not base.exists():
                convert(str(packed), base, options=Options(dequantize=True))
        return str(base.resolve())

    @property
    def answers_while_it_loads(self) -> bool:
        """With several servers: those that are idle first take the new weights while the others answer to the end.

        Of several processes two threads would speak over `Link` at a time.
        """
        num_servers = len(self.settings.urls) or self.settings.num_servers
        return self._link.num_processes == 1 and num_servers > 1

    @property
    def waited_s(self) -> float:
        return self.pool.waited_s if self._link.is_first else 0.0

    @property
    def weights_gb(self) -> float:
        """What the last update of the weights brought to all servers together, in 2**30 bytes."""
        return 0.0 if self._publication is None else self._publication.num_bytes / 2**30

    # The engine's verbs.

    def update_weights(self, variables: Tree, version: int) -> None:
        """Publish these weights as `version`: every server that serves has them when this returns.

        Raises ValueError where they are refused (those before go on answering, unless the servers sleep), EngineLost
        where no server is left. By nccl and ipc a server that took what another one refused waits for the next version.
        """
        info = self._link.first("what vLLM is", lambda: self._call(self.pool.ready()))
        probe_logprobs = self._probe(variables)
        if self._devices is not None:
            transfer = TRANSFERS[self.settings.transport](
                self.run, version, variables, self.config, info["dtype"],
                probe_ids=self.probe_ids, probe_logprobs=probe_logprobs, devices=self._devices,
            )  # fmt: skip
            try:
                self._call(self.pool.install(transfer))
            finally:
                self._call(self.pool.hold())
            self._publication, self.version = transfer, version
            return
        if self.settings.publish == "adapter":
            export = adapter_export(self.run, version, variables, self.config)
        else:
            export = model_export(self.run, version, variables, self.config, info["dtype"])
        # What is refused is, before the hosts gather.
        self._link.first("how the weights travel", lambda: self._choose_ways(export.manifest.nbytes))
        if not self._link.is_first:
            export.finish()  # takes part in the gathering
        self._link.first(f"version {version} of the weights", lambda: self._publish(export, probe_logprobs))
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, report: Report | None = None
    ) -> list[Rollout]:
        limits = sampling.max_tokens_each or (sampling.max_tokens,) * len(prompts)
        for prompt, limit in zip(prompts, limits, strict=True):
            check_prompt(prompt, limit, context=self.max_model_len, vocab_size=self.config.vocab_size)
        with self._arrays_lent():
            drawn = self._link.first("responses", lambda: self._generate(prompts, sampling, limits, seed, report))
        return [
            Rollout(group, np.asarray(ids, np.int32), np.asarray(logprobs, np.float32), finished, version)
            for group, ids, logprobs, finished, version in drawn
        ]

    def sleep(self) -> None:
        """Servers on the trainer's devices give back their memory, and lose their weights, until the next version."""
        # One that was lost a moment ago starts and loads first. Process 0 decides: each may see other devices of its host.
        with self._arrays_lent() if self.sleeps else nullcontext():
            self._link.first("sleep of the servers", lambda: self._call(self.pool.sleep()) if self.sleeps else None)

    def close(self) -> None:
        if not self._link.is_first or self._loop.is_closed():
            return
        if self._forgetting is not None:
            self._forgetting.join()
        self._call(self.pool.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._shared is not None:
            self._shared.close()
        for name in {"disk", self.settings.transport} & {"disk", "file"}:
            shutil.rmtree(self._parent(name), ignore_errors=True)

    # What they are made of.

    @contextmanager
    def _arrays_lent(self) -> Iterator[None]:
        """Within, the weights stay as they are, and a server that starts is sent them; after this they may change."""
        if self._devices is None:
            yield
            return
        self._call(self.pool.lend())
        try:
            yield
        finally:
            self._call(self.pool.hold())

    def _choose_ways(self, num_bytes: int) -> None:
        """In which folders the next version is written, and to whom it is uploaded from there."""
        self._here = self._place_on_this_host(num_bytes)
        transports = self._call(self._transports())
        self._uploads = [s for s, name in transports.items() if name == "http" and s.state != STARTING]
        names = set(transports.values()) - {"http"} or {self._here}
        self._folders = {name: self._parent(name) for name in names}

    def _place_on_this_host(self, num_bytes: int) -> str:
        """In memory where two versions have room (a container's /dev/shm is often of 64 MB), else on the disk of the run."""
        needed = num_bytes if "shm" in self._folders else 2 * num_bytes  # the version of now lies there already
        free = shutil.disk_usage("/dev/shm").free if _sees_shm() else 0
        if free > needed:
            return "shm"
        if self.settings.transport == "shm":
            raise ValueError(
                f"/dev/shm has {free / 1e9:.2f} GB left, and two versions of the weights take {2 * num_bytes / 1e9:.2f} GB: "
                "give the container more (docker's --shm-size), or set rollout.vllm.transport to auto"
            )
        return "disk"

    def _publish(self, export: Export, probe_logprobs: list[float]) -> None:
        before = self._publication
        assert not isinstance(before, Transfer)
        if self._forgetting is not None:
            self._forgetting.join()
        adapter_of = self.source.base if self.settings.publish == "adapter" else None
        publication = Publication(
            export.manifest, self.probe_ids, probe_logprobs, self._loop, self.config, adapter_of=adapter_of,
            transports=self._transport, timeout_s=self.settings.load_timeout_s, before=before,
        )  # fmt: skip
        try:
            publication.send(export, self._folders, self._uploads)
            is_same = before is not None and publication.manifest.digest == before.manifest.digest
            if not is_same:
                self._call(self.pool.install(publication))
        except BaseException:
            publication.forget()
            raise
        if before is not None:
            self._forget(publication if is_same else before)
            if is_same:
                publication = before.named(publication)
                self._call(self.pool.install(publication))
        self._publication = publication

    def _forget(self, publication: Publication) -> None:
        """To give so much memory back takes a while, for which nobody waits."""
        self._forgetting = threading.Thread(target=publication.forget, name="forget")
        self._forgetting.start()

    async def _transports(self) -> dict[Server, str]:
        """How weights get to the servers, as far as that is known of those that start."""
        found = {}
        for server in [server for server in self.pool.servers if server.state != DEAD]:
            if server.state == STARTING and server.process is None and self.settings.transport == "auto":
                continue  # it cannot be asked yet
            gone = server.gone
            try:
                found[server] = await self._transport(server)
            except (ServerLost, ValueError) as error:
                await self.pool.lost(server, gone, str(error))
        return found

    async def _transport(self, server: Server) -> str:
        """As set; else a file on this host where the server sees it, else HTTP."""
        if self.settings.transport != "auto":
            return self.settings.transport
        if server.process is not None:
            return self._here
        if self._here != "shm":
            return "http"
        assert server.client is not None
        return "shm" if await server.client.sees(str(self._parent("shm"))) else "http"

    def _parent(self, transport: str) -> Path:
        """The folder in which versions lie as folders."""
        if transport == "shm":
            if self._shared is None:
                self._shared = SharedFolder()
            return self._shared.path
        if transport == "disk":
            return self.folder / "published"
        assert self.settings.file_dir is not None
        return Path(self.settings.file_dir) / f"jaxrl-{self.run}"

    def _generate(self, prompts, sampling: Sampling, limits: Sequence[int], seed: int, report) -> list[tuple]:
        """Group, tokens, logprobs, finished, version of every response, in order."""
        jobs = []
        most = min(sampling.n, self.pool.max_num_seqs)
        for p, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            first = _seed(seed, p)
            for start in range(0, sampling.n, most):  # vLLM counts the seeds of a request's responses up
                n = min(most, sampling.n - start)
                jobs.append(Job(p, prompt.token_ids, n, limit, first + start))
        drawn = []
        for job, answers, label in self._call(answer(self.pool, jobs, sampling, report)):
            run, _, version = label.rpartition(":")
            assert run == self.run, label
            drawn += [(job.prompt, a.token_ids, a.logprobs, a.finished, int(version)) for a in answers]
        assert len(drawn) == len(prompts) * sampling.n
        return drawn

    def _probe(self, variables: Tree) -> list[float]:
        """The trainer's logprobs of the fixed prompt's tokens, after the first."""
        columns = SPLASH_COLUMNS if self.config.attention == "splash" else PROBE_TOKENS
        ids = np.zeros((num_row_shards(self.mesh), columns), np.int32)
        ids[:, : len(self.probe_ids)] = self.probe_ids
        with use_mesh(self.mesh):
            logprobs = self._probe_logprobs(variables, put_rows(self.mesh, ids), np.int32(len(self.probe_ids)))
        return fetch(logprobs)[0, : len(self.probe_ids) - 1].tolist()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the event loop of the servers, and wait for it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _probe_logprobs(config: ModelConfig, variables: Tree, tokens: jax.Array, length: jax.Array) -> jax.Array:
    """[rows, columns - 1] logprobs of the tokens after the first, of one sequence a row, padded on the right."""
    rows, columns = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(columns), (rows, columns))
    segments = (positions < length).astype(jnp.int32)
    hidden = hidden_states(config, variables, tokens, positions, segments, segments)
    params = variables["params"]
    return target_logprobs(
        hidden, head_table(config, params), positions[:, :-1], tokens[:, 1:], length - 1,
        bias=head_bias(config, params), softcap=config.logit_softcap,
    )[0]  # fmt: skip


def _sees_shm() -> bool:
    return os.access("/dev/shm", os.W_OK)


def _seed(seed: int, prompt: int) -> int:
    """A seed for each prompt of each call, far from those of the others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:7])
