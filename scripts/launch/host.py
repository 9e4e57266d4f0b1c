"""What one host of a run runs: python scripts/launch/host.py --config configs/quickstart.yaml [a.b=c ...]

The trainer's process, with all arguments handed on to scripts/train.py. Where `rollout.engine` is vllm and
`rollout.vllm.urls` names this host, its servers as well: VLLM_PYTHON is the Python that scripts/setup_vllm.sh made,
VLLM_API_KEY the key of all servers of the run, VLLM_DEVICES (a;b) the CUDA_VISIBLE_DEVICES of each one here. What fails is
said with the name of the host. The other launchers start this on every host.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from jaxrl.config import Config, load
from jaxrl.gpu_memory import HALF
from jaxrl.weights.locate import resolve

SCRIPTS = Path(__file__).resolve().parents[1]


def is_here(host: str) -> bool:
    """Whether an address of this machine has the name `host`."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except socket.gaierror:
        return False
    return any(_can_bind(str(address)) for address in addresses)


def _can_bind(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def server_commands(c: Config) -> list[tuple[str, list[str]]]:
    """The vLLM servers of this host: their URLs, and what starts them."""
    v = c.rollout.vllm
    urls = [url for url in v.urls if is_here(urlsplit(url).hostname or "")] if c.rollout.engine == "vllm" else []
    if urls and "VLLM_API_KEY" not in os.environ:
        raise ValueError("set VLLM_API_KEY to one key for all vLLM servers and trainers of the run")
    longest = c.data.max_prompt_length + c.data.max_response_length
    python = os.environ.get("VLLM_PYTHON", sys.executable)
    share = v.gpu_memory_utilization or (None if "VLLM_DEVICES" in os.environ else HALF)
    assert c.model.path is not None, "a config in a file names its model"
    return [
        (url, [
            python, str(SCRIPTS / "serve_vllm.py"), str(resolve(c.model.path)), "--host", "0.0.0.0",
            "--port", str(urlsplit(url).port or 8000), "--dtype", v.dtype, "--max-model-len", str(longest),
            "--max-num-seqs", str(c.rollout.max_num_seqs), *([] if share is None else ["--gpu-memory-utilization", str(share)]),
            "--lora-rank", str(c.model.lora_rank if v.publish == "adapter" else 0),
        ])
        for url in urls
    ]  # fmt: skip


def run(trainer: list[str], servers: list[tuple[str, list[str]]]) -> int:
    """The trainer beside its servers, until one of them ends; then the others are ended too. The exit code."""
    host, devices = socket.gethostname(), os.environ.get("VLLM_DEVICES", "").split(";")
    processes: dict[str, subprocess.Popen] = {}
    for number, (url, command) in enumerate(servers):
        own = {"CUDA_VISIBLE_DEVICES": devices[number]} if number < len(devices) and devices[number] else {}
        processes[f"vLLM server {url}"] = subprocess.Popen(command, env=os.environ | own)
    processes["trainer"] = subprocess.Popen(trainer)
    signal.signal(signal.SIGTERM, lambda *_: processes["trainer"].send_signal(signal.SIGTERM))
    while not (ended := [name for name, process in processes.items() if process.poll() is not None]):
        time.sleep(0.2)
    code = processes[ended[0]].returncode
    if code and ended[0] != "trainer":
        print(f"error: {ended[0]} on {host} ended with exit code {code}; the run ends", file=sys.stderr, flush=True)
    for process in processes.values():
        if process.poll() is None:
            process.terminate()  # not SIGINT, which what a shell starts in the background ignores
    for process in processes.values():
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
    return 128 - code if code < 0 else code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    for flag in ("--coordinator", "--num-processes", "--process-id"):
        parser.add_argument(flag, help="as scripts/train.py takes it")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_args()
    trainer = [sys.executable, "-u", str(SCRIPTS / "train.py"), *sys.argv[1:]]
    try:
        servers = server_commands(load(args.config, args.overrides))
    except ValueError as error:
        sys.exit(f"error: on {socket.gethostname()}: {error}")
    if not servers:
        os.execv(sys.executable, trainer)  # no one in between
    sys.exit(run(trainer, servers))


if __name__ == "__main__":
    main()
