"""Print a Kubernetes JobSet that trains a config, one pod a node:

    python scripts/launch/k8s_jobset.py --config configs/ppo_gsm8k_qwen2_7b.yaml --nodes 2 --image IMAGE \\
        --claim runs [a.b=c ...] > jobset.yaml
    kubectl apply -f jobset.yaml

IMAGE has the repository as its working directory, with jaxrl installed. The claim is a ReadWriteMany volume; it is mounted at
/runs, and the run folder lies there. A pod that fails restarts all of them, and they go on from the last checkpoint. With
`rollout.engine: vllm` each pod also runs a vLLM server, by the Python that `rollout.vllm.python` names in the image; their
key is VLLM_API_KEY of the secret <name>-vllm.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import yaml

from jaxrl.cluster import PORT
from jaxrl.config import Config, load

WORKERS = "workers"
MOUNT = "/runs"
SERVER_PORT = 8000


def job_set(
    c: Config, config: str, overrides: list[str], *, nodes: int, image: str, claim: str, resources: dict[str, str],
    selector: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    name = re.sub(r"[^a-z0-9]+", "-", c.trainer.experiment_name.lower()).strip("-")[:40].strip("-")
    if not re.match("[a-z]", name):
        name = f"run-{name}"[:40].strip("-")
    # What the JobSet controller calls the pods in DNS.
    hosts = [f"{name}-{WORKERS}-0-{i}.{name}" for i in range(nodes)]
    environment: list[dict[str, Any]] = [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{hosts[0]}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(nodes)},
    ]
    arguments = ["--config", config, *overrides, f"trainer.run_dir={MOUNT}/{c.trainer.experiment_name}"]
    if c.rollout.engine == "vllm":
        urls = ",".join(f"http://{host}:{SERVER_PORT}" for host in hosts)
        arguments += [f"rollout.vllm.urls=[{urls}]", "rollout.vllm.python=null"]
        key = {"secretKeyRef": {"name": f"{name}-vllm", "key": "VLLM_API_KEY"}}
        environment += [
            {"name": "VLLM_PYTHON", "value": c.rollout.vllm.python or "python"},
            {"name": "VLLM_API_KEY", "valueFrom": key},
        ]
    container = {
        "name": "trainer",
        "image": image,
        "command": ["python", "-u", "scripts/launch/host.py", *arguments],
        "env": environment,
        "ports": [{"containerPort": PORT}] + [{"containerPort": SERVER_PORT}] * (c.rollout.engine == "vllm"),
        "resources": {"limits": resources},
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 600,  # a preempted run ends its step and saves
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    } | ({"nodeSelector": selector} if selector else {})
    job = {
        "completionMode": "Indexed", "completions": nodes, "parallelism": nodes, "backoffLimit": 0,
        "template": {"spec": pod},
    }  # fmt: skip
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 20},
            "replicatedJobs": [{"name": WORKERS, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pairs(items: list[str], flag: str) -> dict[str, str]:
    wrong = [item for item in items if not re.fullmatch("[^=]+=[^=]+", item)]
    if wrong:
        raise ValueError(f"{flag} {wrong[0]} must be NAME=VALUE")
    return dict(item.split("=") for item in items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, here and in the image")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--image", required=True)
    parser.add_argument("--claim", required=True, help="a PersistentVolumeClaim that all pods may write")
    parser.add_argument("--limit", action="append", metavar="NAME=N", help="of a pod (default: nvidia.com/gpu=8)")
    parser.add_argument("--selector", action="append", default=[], metavar="LABEL=VALUE", help="of the nodes")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_args()
    try:
        if args.nodes < 1:
            raise ValueError(f"--nodes {args.nodes} must be 1 or more")
        written = job_set(
            load(args.config, args.overrides), args.config, args.overrides, nodes=args.nodes, image=args.image,
            claim=args.claim, resources=_pairs(args.limit or ["nvidia.com/gpu=8"], "--limit"),
            selector=_pairs(args.selector, "--selector"),
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"# python {' '.join(['scripts/launch/k8s_jobset.py', *sys.argv[1:]])}")
    print(yaml.safe_dump(written, sort_keys=False, width=120), end="")


if __name__ == "__main__":
    main()
