"""Train with N processes on this machine: python scripts/launch/local.py -n 2 --config configs/quickstart.yaml [a.b=c ...]

What follows -n, --devices and --port goes to scripts/train.py as it is. Each process's lines come with its number before them.
When one ends badly the others are ended too, and the last line names it. SIGTERM and Ctrl-C are handed on: the run
saves a checkpoint and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from jaxrl.link import PEER_LOST

TRAIN = Path(__file__).parents[1] / "train.py"
PATIENCE_S = 5.0  # for the others to say by themselves why they end


class Process:
    """One process of the run, its output copied line by line."""

    def __init__(self, number: int, command: list[str], environment: dict[str, str]):
        self.number = number
        self._popen = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._copier = threading.Thread(target=self._copy, daemon=True)
        self._copier.start()
        self.was_ended = False

    def _copy(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            print(f"[{self.number}] {line.rstrip()}", flush=True)

    @property
    def code(self) -> int | None:
        """The exit code as a shell counts: 128 + the signal. None: it runs."""
        code = self._popen.poll()
        return 128 - code if code is not None and code < 0 else code

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signum)

    def end(self) -> None:
        """Kill what is left of it, also where it is stopped."""
        if self.code is None:
            self.was_ended = True
        self.send(signal.SIGKILL)
        self._popen.wait()
        self._copier.join(timeout=2)

    def __str__(self) -> str:
        return f"process {self.number} (pid {self._popen.pid})"


def start(n: int, devices: int | None, port: int | None, arguments: list[str]) -> list[Process]:
    port = port or _free_port()
    processes = []
    for i in range(n):
        environment = dict(os.environ)
        if devices is not None:  # of a CPU they are virtual, of accelerators each process has its own part
            environment["XLA_FLAGS"] = (
                f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            )
            environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(i * devices + d) for d in range(devices))
        command = [sys.executable, "-u", str(TRAIN), "--num-processes", str(n)]
        command += ["--coordinator", f"127.0.0.1:{port}", "--process-id", str(i)] if n > 1 else []
        processes.append(Process(i, [*command, *arguments], environment))
    return processes


def wait(processes: list[Process]) -> int:
    """Until all have ended; the exit code of the run. The first that ends badly takes the others with it."""

    def hand_on(signum: int, _: object) -> None:
        for process in processes:
            process.send(signal.SIGTERM)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, hand_on)
    deadline = None
    ended: list[Process] = []  # in their order
    while len(ended) < len(processes):
        ended += [process for process in processes if process.code is not None and process not in ended]
        if deadline is None and any(process.code for process in ended):
            deadline = time.monotonic() + PATIENCE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for process in processes:
        process.end()
    return _verdict(ended + [process for process in processes if process not in ended])


def _verdict(processes: list[Process]) -> int:
    bad = [process for process in processes if process.code]
    preempted = 128 + signal.SIGTERM
    if not bad or all(process.code == preempted for process in bad):
        return preempted if bad else 0
    causes = [p for p in bad if not p.was_ended and p.code not in (PEER_LOST, preempted)] or [
        p for p in bad if p.was_ended
    ]
    cause = (causes or bad)[0]
    code = cause.code or 0
    if cause.was_ended:
        how = "did not answer any more and was killed"
    elif code > 128:
        how = f"was killed by {signal.Signals(code - 128).name}"
    else:
        how = f"ended with exit code {code}"
    print(f"error: {cause} on {socket.gethostname()} {how}; the run has ended", file=sys.stderr, flush=True)
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument("--devices", type=int, metavar="D", help="devices of each process (default: all that it sees)")
    parser.add_argument("--port", type=int, help="of the coordinator (default: a free one)")
    args, arguments = parser.parse_known_args()
    if args.n < 1:
        sys.exit(f"error: -n {args.n} must be 1 or more")
    sys.exit(wait(start(args.n, args.devices, args.port, arguments)))


if __name__ == "__main__":
    main()
