"""One vLLM server on this host, as the trainer holds it: start, look at, end. Standard library only.

The process that is started is the watchdog (`vllm_server.py`), in a session of its own. Its standard input is a pipe
from here: when this process ends in whatever way, the watchdog sees it and ends the server.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from .vllm_adapter import ServerSpec, explain
from .vllm_server import LOG, PATIENCE_S, PORT_IN_USE, STATE, unlink

PACKAGE = Path(__file__).parents[1]
_SCRATCH = (
    "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
)  # of a server: sockets, and exports that come over HTTP


class ServerProcess:
    """`spec.port` 0 takes a free one at every start."""

    def __init__(self, python: str, spec: ServerSpec, api_key: str):
        if not Path(python).exists() or Path(python).is_dir() or not os.access(python, os.X_OK):
            wrong = "is no program" if Path(python).exists() else "is not there"
            raise ValueError(
                f"rollout.vllm.python {python} {wrong}: `scripts/setup_vllm.sh DIR` makes an environment with vLLM and "
                "prints the path to set"
            )
        self.python, self._spec, self._api_key = python, spec, api_key
        self.folder = Path(spec.folder)
        self.port = spec.port
        self._scratch = ""
        self._log_start = 0
        self._watchdog: subprocess.Popen | None = None
        self._lock = threading.Lock()  # an end waits for a start that is under way

    @property
    def url(self) -> str:
        return self.url_for("127.0.0.1" if self._spec.host == "0.0.0.0" else "::1")

    def url_for(self, everywhere: str) -> str:
        """With the host's name `everywhere` where the server listens at all addresses."""
        host = everywhere if self._spec.host in ("0.0.0.0", "::") else self._spec.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def pid(self) -> int:
        """Of the watchdog, and of the process group that all of the server is."""
        assert self._watchdog is not None
        return self._watchdog.pid

    def start(self) -> None:
        with self._lock:
            self._start()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self._spec.port or _free_port()
        # Sockets lie there, whose paths must be short.
        self._scratch = tempfile.mkdtemp(prefix="jaxrl-vllm-", dir=_SCRATCH)
        spec = dataclasses.replace(self._spec, port=self.port, scratch=self._scratch)
        # jaxrl alone: beside it may lie all that is installed for the trainer, which is not for vLLM.
        path = Path(self._scratch) / "python"
        path.mkdir()
        (path / PACKAGE.name).symlink_to(PACKAGE)
        env = os.environ | {"VLLM_API_KEY": self._api_key, "PYTHONPATH": str(path), "TMPDIR": self._scratch}
        with self.log.open("ab") as log:
            self._log_start = log.tell()  # that of the starts before is kept
            try:
                self._watchdog = subprocess.Popen(
                    [self.python, "-m", "jaxrl.rollout.vllm_server", json.dumps(dataclasses.asdict(spec))],
                    stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=env,
                )  # fmt: skip
            except OSError as error:
                shutil.rmtree(self._scratch)
                raise ValueError(f"rollout.vllm.python {self.python} cannot be run: {error.strerror}") from None

    def ended(self) -> str | None:
        """Why the server is not running, in words; None while it is."""
        if self._watchdog is None:
            return "it was not started"
        code = self._watchdog.poll()
        if code is None:
            return None
        return f"{self.explained() or f'it ended (exit code {code})'}; its log is {self.log}"

    def explained(self) -> str | None:
        """What its log says went wrong, in a sentence, if that is known."""
        return explain(self.tail(50_000))

    def port_was_taken(self) -> bool:
        return self._watchdog is not None and self._watchdog.poll() == PORT_IN_USE

    def tail(self, num_bytes: int) -> str:
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, self.log.stat().st_size - num_bytes))
            return file.read().decode(errors="replace")

    def end(self) -> None:
        """All of its processes are gone after this, and what they had in shared memory."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._watchdog is None:
            return
        watchdog, self._watchdog = self._watchdog, None
        assert watchdog.stdin is not None
        watchdog.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # it is stopped, or stuck
            watchdog.wait(PATIENCE_S + 3.0)
        with suppress(ProcessLookupError):
            os.killpg(watchdog.pid, signal.SIGKILL)
        watchdog.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)
        try:
            state = json.loads((self.folder / STATE).read_text())
        except (OSError, ValueError):
            return
        if state["group"] == watchdog.pid:
            time.sleep(0.05)  # the kernel takes a moment to end what was killed
            unlink(set(state["shared_memory"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
