"""The watchdog of one vLLM server: starts it, and ends all of it when it or whoever asked for it is gone.

    python -m jaxrl.rollout.vllm_server '{"model": ..., "host": ..., "port": ..., "folder": ...}'

Runs in vLLM's environment, in a session of its own, and needs the standard library alone. Its standard input is a pipe
whose other end nobody but the trainer holds: when the trainer ends, whatever ended it, the pipe does. Then, as when the
server ends or a signal comes, every process of the session is ended and the shared memory that they mapped unlinked.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from .vllm_adapter import ServerSpec, command, environment, installed

LOG, STATE = "server.log", "server.json"
PATIENCE_S = 5.0  # between the request to end and the end
NO_VLLM, PORT_IN_USE = 3, 4  # exit codes
_PR_SET_PDEATHSIG = 1


def main(given: str) -> int:
    spec = ServerSpec(**json.loads(given))
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = installed()
    if found is None:
        print(f"{sys.executable}: No module named 'vllm'", file=sys.stderr)
        return NO_VLLM
    if not _is_free(spec.host, spec.port):
        print(f"{spec.host}:{spec.port}: Address already in use", file=sys.stderr)
        return PORT_IN_USE
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # runs the `finally` below
    env = os.environ | environment(spec, found[1]) | {"JAXRL_WATCHDOG_PID": str(os.getpid())}
    shared: set[str] = set()
    with (folder / LOG).open("ab") as log:
        server = subprocess.Popen(
            command(sys.executable, spec, found[1]), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip
    try:
        while server.poll() is None:
            if select.select([sys.stdin], [], [], 0.5)[0] and not os.read(sys.stdin.fileno(), 1):
                break  # whoever holds the other end is gone
            if not (now := shared_memory(os.getpgrp())) <= shared:
                shared |= now
                _write(folder / STATE, {"group": os.getpgrp(), "shared_memory": sorted(shared)})
        return server.poll() or 0
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        shared |= shared_memory(os.getpgrp())
        _end(server)
        unlink(shared)
        shutil.rmtree(spec.scratch, ignore_errors=True)


def _end(server: subprocess.Popen) -> None:
    """Ask the server to end, and after `PATIENCE_S` do not ask any more."""
    server.terminate()
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and (server.poll() is None or members(os.getpgrp()) - {os.getpid()}):
        time.sleep(0.05)
    for pid in members(os.getpgrp()) - {os.getpid()}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    server.wait()


def members(group: int) -> set[int]:
    """The living processes of a group."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(pgrp) == group and state != "Z":
            found.add(int(stat.parent.name))
    return found


def shared_memory(group: int) -> set[str]:
    """The files in /dev/shm that the processes of a group have mapped: their own, and not the trainer's exports, which
    lie in a folder there and are what the next server will load.
    """
    names = set()
    for pid in members(group):
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        names |= {line[line.index("/dev/shm/") :] for line in maps.splitlines() if "/dev/shm/" in line}
    names = {name for name in names if name.count("/") == 3}
    return {name for name in names if not name.endswith(" (deleted)")}


def unlink(shared: set[str]) -> None:
    for name in shared:
        Path(name).unlink(missing_ok=True)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _write(path: Path, content: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
