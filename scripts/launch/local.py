"""Train with N processes on this machine: python scripts/launch/local.py -n 2 --config configs/quickstart.yaml [a.b=c ...]

What is not -n, --devices or --port goes to the trainer as it is. Each process's lines come with its number before them.
When one ends badly the others end too, and the last line names it. SIGTERM and Ctrl-C are handed on: the run saves a
checkpoint and ends.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxrl.launching import Member, wait

SCRIPTS = Path(__file__).resolve().parents[1]


def start(n: int, devices: int | None, port: int | None, arguments: list[str]) -> Iterator[Member]:
    port = port or _free_port()
    for i in range(n):
        environment = dict(os.environ)
        if devices is not None:  # of a CPU they are virtual, of accelerators each process has its own part
            flags = environment.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
            environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(i * devices + d) for d in range(devices))
        # The first one may have vLLM servers beside it.
        script = SCRIPTS / ("launch/host.py" if i == 0 else "train.py")
        place = ["--coordinator", f"127.0.0.1:{port}", "--process-id", str(i)] if n > 1 else []
        command = [sys.executable, "-u", str(script), "--num-processes", str(n), *place, *arguments]
        yield Member(str(i), f"process {i} on {socket.gethostname()}", command, environment=environment)


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
