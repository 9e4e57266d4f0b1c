"""Train on several hosts from a shell: what ssh.sh and tpu_pod.sh run.

    python scripts/launch/remote.py ssh HOSTFILE --config configs/x.yaml [a.b=c ...]
    python scripts/launch/remote.py tpu NAME ZONE --config configs/x.yaml [a.b=c ...]

HOSTFILE has a host a line, as ssh takes it (user@host); the first runs process 0, and its port JAXRL_PORT (8476) must be
open to the others. NAME is a Cloud TPU VM; its workers ask its metadata for each other. On every host the repository lies in
JAXRL_DIR (this folder) and PYTHON (this Python) has jaxrl; the run folder is on a disk that they share. SSH and GCLOUD
replace the commands `ssh` and `gcloud`. Lines come with the host's name before them, and the host that fails is named.
Ctrl-C ends the run with a checkpoint, and so does the end of this process, whatever ends it.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
from pathlib import Path

from jaxrl.cluster import PORT
from jaxrl.launching import Member, wait

# The input's first line is the key of the vLLM servers; when it ends, the launcher is gone.
_WATCHED = """read -r VLLM_API_KEY; export VLLM_API_KEY; exec 3<&0
cd {folder} || exit 1
{command} </dev/null 3<&- & trainer=$!
( while read -r _ <&3; do :; done; kill -TERM $trainer ) >/dev/null 2>&1 & watcher=$!
exec 3<&-
wait $trainer; code=$?
kill $watcher 2>/dev/null
exit $code"""


def ssh_commands(host_file: str, arguments: list[str]) -> dict[str, list[str]]:
    """What runs the part of each host, by its name."""
    path = Path(host_file)
    if not path.is_file():
        raise ValueError(f"the host file {host_file} is not there: write one host a line")
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    hosts = [line for line in lines if line]
    if not hosts or len(set(hosts)) < len(hosts):
        raise ValueError(f"the host file {host_file} must name one host or more, each once")
    first = f"{hosts[0].rpartition('@')[2]}:{os.environ.get('JAXRL_PORT', PORT)}"
    ssh = shlex.split(os.environ.get("SSH", "ssh -o BatchMode=yes -o ConnectTimeout=20"))
    places = [
        ["--num-processes", str(len(hosts)), "--coordinator", first, "--process-id", str(i)] for i in range(len(hosts))
    ]
    return {
        host: [*ssh, host, _script(arguments + (place if len(hosts) > 1 else place[:2]))]
        for host, place in zip(hosts, places, strict=True)
    }


def tpu_commands(name: str, zone: str, arguments: list[str]) -> dict[str, list[str]]:
    gcloud = [*shlex.split(os.environ.get("GCLOUD", "gcloud")), "compute", "tpus", "tpu-vm"]
    describe = [*gcloud, "describe", name, f"--zone={zone}", "--format=value(networkEndpoints.len())"]
    done = subprocess.run(describe, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip().isdigit():
        reason = (done.stderr.strip().splitlines() or [f"it printed {done.stdout.strip()!r}"])[-1]
        raise ValueError(f"gcloud does not know the TPU VM {name} in zone {zone}: {reason}")
    script = _script([*arguments, "--coordinator", "tpu"])
    return {
        f"{name} worker {i}": [*gcloud, "ssh", name, f"--zone={zone}", f"--worker={i}", f"--command={script}"]
        for i in range(int(done.stdout))
    }


def _script(arguments: list[str]) -> str:
    command = [os.environ.get("PYTHON", sys.executable), "-u", "scripts/launch/host.py", *arguments]
    folder = os.environ.get("JAXRL_DIR", os.getcwd())
    return _WATCHED.format(folder=shlex.quote(folder), command=shlex.join(command))


def main() -> None:
    kind, *rest = sys.argv[1:] or ["--help"]
    try:
        if kind == "ssh" and len(rest) > 1:
            commands = ssh_commands(rest[0], rest[1:])
        elif kind == "tpu" and len(rest) > 2:
            commands = tpu_commands(rest[0], rest[1], rest[2:])
        else:
            sys.exit(__doc__)
    except ValueError as error:
        sys.exit(f"error: {error}")
    key = os.environ.get("VLLM_API_KEY") or secrets.token_urlsafe(24)
    sys.exit(wait(Member(host, f"host {host}", command, first_line=key) for host, command in commands.items()))


if __name__ == "__main__":
    main()
