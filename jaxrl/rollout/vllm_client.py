"""What is said to one vLLM server over HTTP: requests, their answers, and what a failure is called.

A server that does not answer, answers late or answers nonsense raises `ServerLost`; what it refuses by right raises
`Refused` (an export) or ValueError (a request, a key).
"""

from __future__ import annotations

import base64
import posixpath
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from .engine import Sampling
from .protocol import Manifest, Refused
from .vllm_adapter import (
    ADAPTER_NAME,
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
    Answer,
    generate_message,
    probe_message,
    read_answers,
    read_probe,
)


class ServerLost(RuntimeError):
    """A server that cannot be relied on any more; the message says why."""


# A connection that was dropped without a word, as routers do with quiet ones, is noticed after two minutes.
KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
]


class Client:
    """`timeout_s` is for what is quick."""

    def __init__(self, url: str, api_key: str, *, timeout_s: float):
        self.url, self.timeout_s = url, timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # The server closes what was idle for 5 seconds: before that, so that no request meets a closed connection.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=KEEP_ALIVE)
        self._http = httpx.AsyncClient(base_url=url, headers=headers, transport=transport, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    async def info(self) -> dict[str, Any]:
        """Version of vLLM, device, dtype and model of the server."""
        info = await self._send("GET", INFO, what="the first answer", timeout_s=5.0)
        if not {"vllm", "device", "dtype", "model"} <= info.keys():
            raise ValueError(
                f"{self.url} is no server that scripts/serve_vllm.py started: it answers with something else"
            )
        return info

    async def sees(self, path: str) -> bool:
        """Whether the server has a file; a relative path is one of an export that was uploaded."""
        what = "a look at a file"
        return _part("sees", await self._send("GET", f"{SEES}?{path}", what=what), what)

    async def ping(self) -> None:
        await self._rpc("jaxrl_ping", what="a sign of life", timeout_s=None)

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, *, n: int, max_tokens: int, seed: int, adapter: bool,
        timeout_s: float,
    ) -> list[Answer]:  # fmt: skip
        message = generate_message(token_ids, sampling, n=n, max_tokens=max_tokens, seed=seed, adapter=adapter)
        answer = await self._send("POST", GENERATE, message, what="a response", timeout_s=timeout_s)
        try:
            return read_answers(answer, n)
        except (KeyError, TypeError, ValueError) as error:
            raise ServerLost(f"it answered a prompt with what is no response ({error!r})") from None

    async def probe(self, token_ids: Sequence[int], *, adapter: bool) -> tuple[list[float], frozenset[str]]:
        """Logprobs of the tokens after the first, and the versions of the weights that gave them."""
        answer = await self._send("POST", GENERATE, probe_message(token_ids, adapter=adapter), what="the probe")
        try:
            return read_probe(answer, len(token_ids))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise ServerLost(f"it answered the probe with what is no answer ({error!r})") from None

    async def upload(
        self, name: str, chunks: AsyncIterator[bytes], *, base: str | None = None, timeout_s: float
    ) -> str:
        """Send an export, or what it changes of the one that the server has as `base` and loses by that; its path there."""
        route = UPLOAD + name + (f"?{base}" if base else "")
        answer = await self._send("PUT", route, content=chunks, what="an export", timeout_s=timeout_s)
        return _part("path", answer, "an export")

    async def load(self, path: str, manifest: Manifest, *, timeout_s: float) -> dict[str, Any]:
        """Put an export in the place of the old weights. What the server says of it: digest, seconds."""
        what = f"version {manifest.version} of the weights"
        answer = await self._rpc("jaxrl_load", path, manifest.to_json(), what=what, timeout_s=timeout_s)
        return _accepted(answer)

    async def fits(self, manifest: Manifest) -> None:
        """Raises Refused where the model that is served has other tensors."""
        what = f"a look at version {manifest.version} of the weights"
        _accepted(await self._rpc("jaxrl_fits", manifest.to_json(), what=what))

    async def nccl(self) -> dict[str, Any]:
        """`version` of the server's NCCL and `num_workers`."""
        return _accepted(await self._rpc("jaxrl_nccl", what="its version of NCCL"))

    async def join(self, unique_id: bytes, num_ranks: int, *, timeout_s: float) -> None:
        """Returns when all ranks have joined, of which the first is ours."""
        encoded, what = base64.b64encode(unique_id).decode(), "its part in a group of NCCL"
        _accepted(await self._rpc("jaxrl_join", encoded, num_ranks, what=what, timeout_s=timeout_s))

    async def receive(self, manifest: Manifest, *, timeout_s: float) -> dict[str, Any]:
        """As `load`, of what is broadcast meanwhile."""
        what = f"version {manifest.version} of the weights"
        return _accepted(await self._rpc("jaxrl_receive", manifest.to_json(), what=what, timeout_s=timeout_s))

    async def open(self, handle: bytes) -> None:
        """Let it open a buffer of CUDA's."""
        encoded = base64.b64encode(handle).decode()
        _accepted(await self._rpc("jaxrl_open", encoded, what="a look into a buffer of the GPU"))

    async def portion(self, manifest: Manifest | None, pieces: Sequence[Sequence[int]]) -> None:
        """Let it take what the buffer holds: number of a tensor, place in it, place in the buffer, bytes. The manifest
        comes with the first portion."""
        announced = None if manifest is None else manifest.to_json()
        _accepted(await self._rpc("jaxrl_portion", announced, pieces, what="a portion of new weights"))

    async def finish(self, manifest: Manifest) -> dict[str, Any]:
        """As `load`, of what came in portions."""
        what = f"version {manifest.version} of the weights"
        return _accepted(await self._rpc("jaxrl_finish", manifest.to_json(), what=what))

    async def load_adapter(self, path: str, manifest: Manifest, *, timeout_s: float) -> None:
        """Put an adapter, a file in a folder of its own with a config beside it, in the place of the old one."""
        what = f"version {manifest.version} of the adapter"
        answer = await self._rpc("jaxrl_check", path, manifest.to_json(), False, what=what, timeout_s=timeout_s)
        _accepted(answer)
        message = {"lora_name": ADAPTER_NAME, "lora_path": posixpath.dirname(path), "load_inplace": True}
        await self._send("POST", LOAD_ADAPTER, message, what=what, timeout_s=timeout_s)

    async def set_version(self, label: str) -> None:
        await self._send("POST", SET_VERSION, {"new_version": label}, what="the name of a version")

    async def reset_cache(self) -> None:
        """Forget the prefixes that the old weights computed."""
        answer = await self._send("POST", RESET_CACHE, what="an empty prefix cache")
        if not answer.get("success"):
            raise ServerLost("it kept the prefix cache of the old weights")

    async def sleep(self, level: int) -> None:
        """Give back the memory of the KV cache and of the weights, which level 1 keeps in the host's."""
        await self._send("POST", f"{SLEEP}?level={level}", what="its memory")

    async def wake_up(self, tag: str) -> None:
        """Take the memory of `tag` again: weights, whose contents are lost after level 2, or kv_cache."""
        await self._send("POST", f"{WAKE_UP}?tags={tag}", what=f"its return from sleep ({tag})")

    async def _rpc(self, method: str, *args: Any, what: str, timeout_s: float | None = 0) -> list[dict[str, Any]]:
        message = {"method": method, "args": list(args)}
        answer = await self._send("POST", RPC, message, what=what, timeout_s=timeout_s)
        try:
            results = answer["results"]
            assert results and all(isinstance(result, dict) for result in results)
        except (KeyError, TypeError, AssertionError):
            raise ServerLost(f"it was asked for {what} and answered nonsense") from None
        return results

    async def _send(
        self, method: str, route: str, message: Any = None, *, what: str, content: Any = None,
        timeout_s: float | None = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """`timeout_s` 0: that of this client."""
        seconds = self.timeout_s if timeout_s == 0 else timeout_s
        timeout = httpx.Timeout(seconds, connect=10.0, pool=None)
        try:
            reply = await self._http.request(method, route, json=message, content=content, timeout=timeout)
        except httpx.TimeoutException:
            raise ServerLost(f"it was waited for {seconds or 10:.0f} s for {what} in vain") from None
        except httpx.HTTPError as error:
            raise ServerLost(f"the connection broke while it was asked for {what} ({error!r})") from None
        if reply.status_code == 401:
            raise ValueError(f"{self.url} refuses the API key: set the environment variable VLLM_API_KEY to its key")
        if reply.status_code == 404:
            raise ValueError(
                f"{self.url} has no route {route}: it is not a server that scripts/serve_vllm.py started, or its vLLM "
                "is of a version that this jaxrl does not know"
            )
        if 400 <= reply.status_code < 500:
            raise ValueError(f"{self.url} refuses a request for {what}: {reply.text[:500]}")
        try:
            reply.raise_for_status()
            is_json = reply.headers.get("content-type", "").startswith("application/json")
            return reply.json() if is_json else {}  # some routes answer with a sentence, or nothing
        except (httpx.HTTPStatusError, ValueError):
            text = " ".join(reply.text.split())[:300]
            raise ServerLost(f"it was asked for {what} and answered {reply.status_code}: {text}") from None


def _part(name: str, answer: dict[str, Any], what: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise ServerLost(f"it was asked for {what} and answered nonsense")
    return answer[name]


def _accepted(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the workers of a server say of an export, if they took it."""
    for result in results:
        if "broken" in result:
            raise ServerLost(f"it failed within loading weights ({result['broken']})")
    for result in results:
        if "refused" in result:
            raise Refused(result["refused"])
    return results[0]
