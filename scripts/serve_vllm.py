"""Serve a model with vLLM for trainers on this or on other hosts: they name it in `rollout.vllm.urls`.

    VENV/bin/python scripts/serve_vllm.py MODEL_FOLDER --host 0.0.0.0 --port 8000

MODEL_FOLDER is a Hugging Face folder, VENV what scripts/setup_vllm.sh made. Whoever knows the key may put other weights
in the model's place, so the key is asked for on every route: it is VLLM_API_KEY, or else a random one that is printed.
Needs the standard library alone. Ends with Ctrl-C, and all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxrl.rollout.vllm_adapter import INFO, ServerSpec, untried
from jaxrl.rollout.vllm_process import ServerProcess


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--python", default=sys.executable, help="of vLLM's environment, where this is not run by it")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--max-model-len", type=int, help="longest prompt with its response; default: the model's own")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="sequences that decode together")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument(
        "--lora-rank", type=int, default=0, help="above 0: adapters of up to this rank can be published"
    )
    parser.add_argument("--args", type=json.loads, default={}, help='more of vLLM\'s, {"tensor_parallel_size": 2}')
    parser.add_argument("--folder", type=Path, help="for the log; default: a new temporary one")
    parser.add_argument("--start-timeout-s", type=float, default=600.0, help="for so long it is waited for")
    a = parser.parse_args()
    if not (Path(a.model) / "config.json").is_file():
        parser.error(f"{a.model} holds no config.json: name a Hugging Face folder")
    key = os.environ.get("VLLM_API_KEY") or secrets.token_urlsafe(24)
    spec = ServerSpec(
        model=str(Path(a.model).resolve()), host=a.host, port=a.port,
        folder=str(a.folder or tempfile.mkdtemp(prefix="serve-vllm-")), dtype=a.dtype, max_model_len=a.max_model_len,
        max_num_seqs=a.max_num_seqs, gpu_memory_utilization=a.gpu_memory_utilization, lora_rank=a.lora_rank, args=a.args,
    )  # fmt: skip
    server = ServerProcess(a.python, spec, key)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        server.start()
        print(f"starting; the log is {server.log}", flush=True)
        info = _wait(server, key, a.start_timeout_s)
        if warning := untried(info["vllm"]):
            print(warning, file=sys.stderr)
        if "VLLM_API_KEY" not in os.environ:
            print(f"its key, for trainers: export VLLM_API_KEY={key}")
        url = server.url_for(socket.gethostname())
        print(f"ready: rollout.vllm.urls=[{url}] ({info['dtype']}, vLLM {info['vllm']})", flush=True)
        while (ended := server.ended()) is None:
            time.sleep(1.0)
        print(f"error: {ended}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    finally:
        server.end()


def _wait(server: ServerProcess, key: str, timeout_s: float) -> dict[str, str]:
    """What the server says of itself, as soon as it answers."""
    deadline = time.monotonic() + timeout_s
    request = urllib.request.Request(server.url + INFO, headers={"Authorization": f"Bearer {key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if (ended := server.ended()) is not None:
            raise ValueError(ended)
        try:
            with opener.open(request, timeout=10.0) as reply:
                return json.load(reply)
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"it was waited for {timeout_s:.0f} s (--start-timeout-s) to start, and {error}; its log is {server.log}"
                ) from None
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
