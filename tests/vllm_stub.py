"""A server that says what vLLM with `vllm_adapter` in it would say, without a model: for what servers do wrong.

`Stub` runs in a thread; as a program it takes the place of `rollout.vllm.python`, and does what `spec.env` tells it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jaxrl.rollout.cuda import OpenedBuffer
from jaxrl.rollout.protocol import PIECE
from jaxrl.rollout.vllm_adapter import (
    GENERATE,
    INFO,
    LOAD_ADAPTER,
    RESET_CACHE,
    RPC,
    SEES,
    SET_VERSION,
    SLEEP,
    UPLOAD,
    WAKE_UP,
)

LOGPROB = -1.0  # of every token
FROM_DEVICES = {f"jaxrl_{name}" for name in ("nccl", "join", "receive", "open", "portion", "finish")}
Reply = tuple[int, Any]  # status; JSON, or the text of a page


class _Id(ctypes.Structure):  # of NCCL
    _fields_ = (("internal", ctypes.c_ubyte * 128),)


class Stub:
    """`answers` holds what replaces an answer: a route, or a method of the worker, to a function of the message."""

    def __init__(self, port: int = 0):
        self.label = ""
        self.loaded: list[str] = []  # paths, in order
        self.uploads: dict[str, bytes] = {}  # the files that it has, by name
        self.received: list[tuple[str, str, int]] = []  # name, base and bytes of every upload
        self.num_answered = 0
        self.pause_s = 0.0  # before an upload is read
        self.asleep: set[str] = set()  # what has no memory
        self.has_weights = True
        self.dtype = "float32"
        self.received_tensors: dict[str, bytes] = {}
        self.num_portions = 0
        self.announced: Any = None  # the manifest of what comes in portions
        self.draws = False  # tokens 5 and 6 by the seed, and not 5 alone
        self.answers: dict[str, Callable[[Any], Reply]] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"stub": self}))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, route: str, message: Any) -> Reply:
        key = message["method"] if route == RPC else route
        if key in self.answers:
            return self.answers[key](message)
        return self.usual(route, message)

    def usual(self, route: str, message: Any) -> Reply:
        if route == INFO:
            return 200, {"vllm": "0.32.0", "device": "cpu", "dtype": self.dtype, "model": "stub"}
        if route == SEES:
            return 200, {"sees": message in self.uploads}
        if route == RPC and message["method"] == "jaxrl_load":
            path, manifest = message["args"]
            if "weights" in self.asleep:
                return 200, {"results": [{"broken": "there is no memory to load into"}]}
            self.loaded.append(path)
            self.has_weights = True
            return 200, {"results": [{"loaded": manifest["version"], "digest": path}]}
        if route == RPC and message["method"] in FROM_DEVICES:
            return 200, {"results": [getattr(self, message["method"].removeprefix("jaxrl_"))(*message["args"])]}
        if route == RPC or route == LOAD_ADAPTER:
            return 200, {"results": [{}]}
        if route == SET_VERSION:
            self.label = message["new_version"]
            return 200, {}
        if route == RESET_CACHE:
            return 200, {"success": True}
        if route.startswith(SLEEP):
            self.asleep, self.has_weights = {"weights", "kv_cache"}, route == f"{SLEEP}?level=1"
            return 200, {"status": "sleeping"}
        if route.startswith(WAKE_UP):
            self.asleep.remove(route.removeprefix(f"{WAKE_UP}?tags="))
            return 200, {"status": "sleeping" if self.asleep else "awake"}
        if route == GENERATE and (self.asleep or not self.has_weights):
            return 500, {"error": f"asleep: {sorted(self.asleep)}, weights: {self.has_weights}"}
        if route == GENERATE:
            return 200, self.generated(message)
        return 404, {}

    # With the stand-ins for NCCL and CUDA, as the one worker of the server.

    def nccl(self) -> Any:
        version = ctypes.c_int()
        self._nccl = ctypes.CDLL(os.environ["VLLM_NCCL_SO_PATH"])
        assert self._nccl.ncclGetVersion(ctypes.byref(version)) == 0
        return {"version": version.value, "num_workers": 1}

    def join(self, encoded: str, num_ranks: int) -> Any:
        self._comm = ctypes.c_void_p()
        unique_id = _Id.from_buffer_copy(base64.b64decode(encoded))
        assert self._nccl.ncclCommInitRank(ctypes.byref(self._comm), num_ranks, unique_id, 1) == 0
        one = (ctypes.c_float * 1)(2.0)
        assert self._nccl.ncclAllReduce(one, one, ctypes.c_size_t(1), 7, 0, self._comm, None) == 0
        return {} if one[0] == 2.0 else {"broken": f"the sum over 0 and 2 is {one[0]}"}

    def receive(self, manifest: Any) -> Any:
        self.received_tensors = {}
        for name, shape, dtype, _ in manifest["tensors"]:
            count, (code, size) = math.prod(shape), {"F32": (7, 4), "BF16": (9, 2)}[dtype]
            data = ctypes.create_string_buffer(count * size)
            if self._nccl.ncclBroadcast(None, data, ctypes.c_size_t(count), code, 0, self._comm, None):
                return {"broken": f"{name} did not come"}
            self.received_tensors[name] = data.raw
        return self.finish(manifest)

    def open(self, handle: str) -> Any:
        ctypes.CDLL(os.environ["VLLM_NCCL_SO_PATH"])  # as libcuda.so.1
        self._buffer = OpenedBuffer(base64.b64decode(handle))
        return {}

    def portion(self, manifest: Any, pieces: list[list[int]]) -> Any:
        if "weights" in self.asleep:
            return {"broken": "there is no memory to load into"}
        if manifest is not None:
            self.announced, self.received_tensors = manifest, {}
        self.num_portions += 1
        for number, start, place, size in pieces:
            data = ctypes.create_string_buffer(size)
            self._buffer.take(place, ctypes.addressof(data), size)
            name = self.announced["tensors"][number][0]
            assert start == len(self.received_tensors.setdefault(name, b""))
            self.received_tensors[name] += data.raw
        return {}

    def finish(self, manifest: Any) -> Any:
        self.loaded.append(str(manifest["version"]))
        self.has_weights = True
        return {"loaded": manifest["version"], "digest": str(manifest["version"])}

    def take_in(self, name: str, base: str, body: bytes) -> None:
        self.received.append((name, base, len(body)))
        content = bytearray(self.uploads.pop(base) if base else body)
        place = 0
        while base and place < len(body):
            start, length = PIECE.unpack_from(body, place)
            place += PIECE.size + length
            content[start : start + length] = body[place - length : place]
        folder = name.partition("/")[0]
        kept = {other: data for other, data in self.uploads.items() if other.startswith(folder + "/")}
        self.uploads = kept | {name: bytes(content)}

    def generated(self, message: Any) -> Any:
        params, span = message["sampling_params"], [{"version": self.label, "start": 0, "end": 1}]
        if "prompt_logprobs" in params:
            rest = [{"5": {"logprob": LOGPROB}}] * (len(message["token_ids"]) - 1)
            return {"prompt_logprobs": [None, *rest], "choices": [{"weight_versions": span}]}
        self.num_answered += 1
        choices = []
        for i in range(params["n"]):
            seed = params["seed"] + i if self.draws else 0
            tokens = [5 + (seed >> t) % 2 for t in range(params["max_tokens"])]
            content = [{"token_id": token, "logprob": LOGPROB} for token in tokens]
            choices.append({
                "token_ids": tokens, "logprobs": {"content": content}, "finish_reason": "length", "index": i,
                "weight_versions": span,
            })  # fmt: skip
        return {"choices": choices}


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        route, _, query = self.path.partition("?")
        self._reply(*self.stub.answer(route, query))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._reply(*self.stub.answer(self.path, json.loads(body) if body else None))

    def do_PUT(self) -> None:
        pieces = []
        time.sleep(self.stub.pause_s)
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        if UPLOAD in self.stub.answers:
            return self._reply(*self.stub.answer(UPLOAD, self.path))
        name, _, base = self.path.removeprefix(UPLOAD).partition("?")
        self.stub.take_in(name, base, b"".join(pieces))
        self._reply(200, {"path": name})

    def _reply(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def stub_python(folder: Path) -> str:
    """A program to name in `rollout.vllm.python`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$3"\n')
    path.chmod(0o755)
    return str(path)


def main(given: str) -> None:
    spec = json.loads(given)
    os.environ.update(spec["env"])
    if "REPORT" in spec["env"]:
        Path(spec["env"]["REPORT"]).write_text(os.environ["PYTHONPATH"])
    while not Path(spec["env"].get("WAIT_FOR", "/")).exists():
        time.sleep(0.05)
    stub = Stub(spec["port"])
    stub.draws = "DRAWS" in spec["env"]
    poison = spec["env"].get("POISON")  # a token whose prompt ends the server

    def generate(message: Any) -> Reply:
        if "prompt_logprobs" not in message["sampling_params"]:
            time.sleep(float(spec["env"].get("PAUSE_S", 0)))
            if str(message["token_ids"][0]) == poison:
                os._exit(1)
        return stub.usual(GENERATE, message)

    def portion(message: Any) -> Reply:
        may_fail = Path(spec["env"].get("PORTION_FAULT", "/none"))
        if stub.num_portions == 2 and may_fail.exists():
            fault = may_fail.read_text()
            may_fail.unlink()
            time.sleep(60) if fault == "stall" else os._exit(9)
        return stub.usual(RPC, message)

    def load(message: Any) -> Reply:
        version = message["args"][1]["version"]
        if str(version) == spec["env"].get("REFUSE"):
            return 200, {"results": [{"refused": f"version {version} is not for me"}]}
        return stub.usual(RPC, message)

    stub.answers |= {GENERATE: generate, "jaxrl_load": load, "jaxrl_portion": portion}
    if "SLEEPLESS" in spec["env"]:
        stub.answers[f"{SLEEP}?level=2"] = lambda _: (500, {"error": "Memory usage increased after sleeping."})
    while os.read(0, 1):
        pass


if __name__ == "__main__":
    main(sys.argv[1])
