"""Which process of a run this one is: from flags, SLURM, Kubernetes or a TPU pod. The first thing `train.py` asks.

No JAX here, so that a wrong flag costs no start-up. `distributed.start` takes what is found.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

PORT = 8476  # of the coordinator, where nobody names another
_METADATA = "computeMetadata/v1/instance/attributes"


@dataclass(frozen=True)
class Place:
    """The process `process_id` of `num_processes`, which all know process 0 by the address `coordinator`."""

    coordinator: str  # host:port
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None  # those of this host that are its own; None: all of them

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(f"coordinator {self.coordinator!r} must be host:port, for example 10.0.0.1:{PORT}")
        if self.num_processes < 1:
            raise ValueError(f"the number of processes is {self.num_processes} and must be 1 or more")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process id {self.process_id} must lie between 0 and {self.num_processes - 1}, as there are "
                f"{self.num_processes} processes"
            )

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def find(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """The place of this process, or None for a run of one process.

    Flags come first; a flag that is left out is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Without any, a SLURM step of several tasks, an indexed Job of Kubernetes and a TPU slice of several
    hosts on GKE are found by the variables that they set. `coordinator="tpu"` asks a Cloud TPU VM for its pod.
    Raises ValueError where half of what is needed is there.
    """
    if num_processes == 1:
        return None
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(num_processes, environ, "JAX_NUM_PROCESSES")
    process_id = _number(process_id, environ, "JAX_PROCESS_ID")
    found = None
    if coordinator == "tpu":
        found = _tpu_vm(environ)
    elif num_processes is None and process_id is None:
        found = _slurm(environ, coordinator) or _tpu_gke(environ)
    if found is not None:
        return found if found.num_processes > 1 else None
    if process_id is None and "JOB_COMPLETION_INDEX" in environ:
        process_id = int(environ["JOB_COMPLETION_INDEX"])
        if coordinator is None or num_processes is None:
            raise ValueError(
                "this is a pod of an indexed Job (JOB_COMPLETION_INDEX is set), and who the others are is not known: "
                "set JAX_COORDINATOR_ADDRESS=<host of index 0>:<port> and JAX_NUM_PROCESSES, as "
                "scripts/launch/k8s_jobset.py does, or pass --num-processes 1"
            )
    if num_processes == 1 or (coordinator, num_processes, process_id) == (None, None, None):
        return None
    missing = [
        name
        for name, value in (
            ("--coordinator", coordinator), ("--num-processes", num_processes), ("--process-id", process_id)
        )
        if value is None
    ]  # fmt: skip
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(f"a run of several processes also needs {' and '.join(missing)}")
    return Place(coordinator, num_processes, process_id)


def _number(given: int | None, environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if given is not None or not text:
        return given
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r} and must be a whole number")
    return int(text)


def _slurm(environ: Mapping[str, str], coordinator: str | None) -> Place | None:
    """A task of a step of `srun`. Several tasks on a host share its devices: each has the one of its number."""
    names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    if any(name not in environ for name in names):
        return None
    job, process_id, local_id, num_tasks = (int(environ[name]) for name in names[:-1])
    if coordinator is None:  # a port that two jobs on a node do not share
        coordinator = f"{first_host(environ['SLURM_STEP_NODELIST'])}:{60_000 + job % 4096}"
    one_each = re.fullmatch(
        r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    )  # "2(x3),1": two on three nodes
    return Place(coordinator, num_tasks, process_id, None if one_each else (local_id,))


def first_host(node_list: str) -> str:
    """The first name of a SLURM node list: `gpu[003,007-015],login` -> `gpu003`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST {node_list!r} is not a list of hosts")
    return "".join(part or "" for part in match.groups())


def _tpu_gke(environ: Mapping[str, str]) -> Place | None:
    hosts = (environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    if "TPU_WORKER_ID" not in environ:
        return None
    return _of_slices(environ, hosts, int(environ["TPU_WORKER_ID"]))


def _tpu_vm(environ: Mapping[str, str]) -> Place:
    """What the metadata server of a Cloud TPU VM says of its pod."""
    hosts = []
    for worker in _metadata("worker-network-endpoints", environ).split(","):
        parts = worker.split(":")  # a host name, or name:id:address
        hosts.append(parts[2] if len(parts) == 3 else parts[0])
    slices = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)'?", _metadata("tpu-env", environ), re.MULTILINE))
    return _of_slices({**slices, **environ}, hosts, int(_metadata("agent-worker-number", environ)))


def _of_slices(environ: Mapping[str, str], hosts: list[str], worker: int) -> Place:
    """Hosts are of one slice, of which there may be several (MEGASCALE_*)."""
    num_slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    first = (environ.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0] or "localhost").split(":")[0]
    slice_id = int(environ.get("MEGASCALE_SLICE_ID") or 0)
    return Place(f"{first}:{PORT}", len(hosts) * num_slices, worker + slice_id * len(hosts))


def _metadata(key: str, environ: Mapping[str, str]) -> str:
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}/{_METADATA}/{key}", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()
    except (TimeoutError, urllib.error.URLError) as error:
        raise ValueError(
            f"--coordinator tpu asks the metadata server of a Cloud TPU VM for {key}, and {server} gave no answer "
            f"({error}): elsewhere, pass --coordinator host:port, --num-processes and --process-id"
        ) from None
