"""The SLURM launcher, on a real SLURM with two nodes that tests/slurm/cluster.sh sets up on this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_trainer import model, settings  # noqa: F401 (fixtures)
from xla_flags import QUICK

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "srun", "munged") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"slurm-wlm and munge are not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="munge and slurmd want root"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which `sbatch` finds the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([CLUSTER, "up", folder], check=True, stdout=subprocess.DEVNULL, timeout=120)
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    finally:
        subprocess.run([CLUSTER, "down", folder], check=True, timeout=60)


def submit(environment: dict[str, str], config: Path, log: Path) -> str:
    command = [
        "sbatch",
        "--parsable",
        "--nodes",
        "2",
        "--output",
        str(log),
        ROOT / "scripts" / "launch" / "slurm.sbatch",
    ]
    done = subprocess.run(
        [*command, "--config", str(config)], env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def wait_until(condition, log: Path, timeout_s: float = 300):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "the job did not start"
        time.sleep(0.1)
    return found


def is_over(environment: dict[str, str], job: str) -> bool:
    states = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], env=environment, capture_output=True, text=True
    ).stdout
    return not states.split()


def test_a_job_of_two_nodes_names_the_one_that_died_and_goes_on_when_submitted_again(slurm, settings, tmp_path):  # noqa: F811
    tree = settings(
        "job", data__val_files=None, algorithm__adv_estimator="grpo", trainer__total_training_steps=60,
        trainer__save_freq=1, mesh={"data": 2, "fsdp": 1, "tensor": 1},
    )  # fmt: skip
    reward = (tmp_path / "reward.py").read_text()
    (tmp_path / "reward.py").write_text(
        f"import time\n{reward}".replace("    return", "    time.sleep(0.1)\n    return")
    )
    config, folder = tmp_path / "job.json", tmp_path / "job"
    config.write_text(json.dumps(tree))  # JSON is YAML
    one_device = f"{QUICK} --xla_backend_optimization_level=0"
    environment = slurm | {"XLA_FLAGS": one_device}
    log = tmp_path / "first.log"
    job = submit(environment, config, log)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, log)
    written = (folder / "logs" / "process_1.log").read_text()
    pid = int(re.findall(r"process 1 \(host \S+, pid (\d+)\) of 2, with 1 of 2 devices", written)[-1])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_over(slurm, job), log)
    text = log.read_text()
    assert re.search(
        rf"0: error: process 1 \(host \S+, pid {pid}\) has died: its connection was closed; the last step", text
    )
    assert re.search(r"srun: error: node2: task 1: Killed", text) and f"error: job {job} ended with exit code" in text

    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    tree["trainer"]["total_training_steps"] = last + 2
    config.write_text(json.dumps(tree))
    log = tmp_path / "second.log"
    job = submit(environment, config, log)
    wait_until(lambda: is_over(slurm, job), log)
    text = log.read_text()
    assert f"job {job}: done" in text and f"0: Done: {folder / 'hf'}" in text, text
    assert "node[1-2]" in text and text.count("] step ") <= 3  # it went on, and one process printed
    steps = [json.loads(line)["step"] for line in metrics.open()]
    assert steps == list(range(1, last + 3))
