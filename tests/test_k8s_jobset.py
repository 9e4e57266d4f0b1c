"""The JobSet that is printed is one that Kubernetes takes, and its pods find each other."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from jaxrl.cluster import Place, find
from jaxrl.config import load

ROOT = Path(__file__).parents[1]
SCHEMAS = Path(__file__).parent / "data" / "kubernetes"
EXAMPLE = ROOT / "scripts" / "launch" / "k8s_jobset.yaml"
CONFIG = "configs/ppo_gsm8k_qwen2_7b.yaml"


def printed(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "launch" / "k8s_jobset.py"), "--config", CONFIG, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def check(job_set: dict) -> dict:
    """The pod's spec of a JobSet that holds to the schemas."""
    (replicated,) = job_set["spec"]["replicatedJobs"]
    for value, schema in ((job_set, "jobset"), (replicated["template"], "job_template")):
        validator = Draft202012Validator(json.loads((SCHEMAS / f"{schema}.schema.json").read_text()))
        assert not [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
    return replicated["template"]["spec"]["template"]["spec"]


def test_the_example_is_what_the_script_prints_and_holds_to_the_schemas():
    text = EXAMPLE.read_text()
    command = text.splitlines()[0].removeprefix("# python scripts/launch/k8s_jobset.py --config ").split()
    assert command[0] == CONFIG and printed(*command[1:]).stdout == text
    check(yaml.safe_load(text))


@pytest.mark.parametrize("break_it", [{"paralelism": 2}, {"parallelism": "two"}])
def test_the_schemas_refuse_what_kubernetes_would_refuse(break_it):
    job_set = yaml.safe_load(EXAMPLE.read_text())
    job_set["spec"]["replicatedJobs"][0]["template"]["spec"] |= break_it
    with pytest.raises(AssertionError):
        check(job_set)


def test_each_pod_finds_its_place_and_takes_the_arguments_as_they_were_given():
    done = printed(
        "--nodes", "3", "--image", "my/jaxrl:1", "--claim", "disk", "--limit", "google.com/tpu=4",
        "--selector", "cloud.google.com/gke-tpu-topology=4x4", "trainer.experiment_name=Big_Run.2", "actor.optim.lr=1e-5",
    )  # fmt: skip
    job_set = yaml.safe_load(done.stdout)
    pod = check(job_set)
    (container,) = pod["containers"]
    assert job_set["metadata"]["name"] == "big-run-2"
    environ = {item["name"]: item["value"] for item in container["env"]}
    for i in range(3):
        place = find(environ=environ | {"JOB_COMPLETION_INDEX": str(i)})
        assert place == Place("big-run-2-workers-0-0.big-run-2:8476", 3, i)
    script, flag, config, *overrides = container["command"][2:]
    assert (script, flag) == ("scripts/launch/host.py", "--config") and (ROOT / script).is_file()
    c = load(ROOT / config, overrides)
    assert (c.actor.optim.lr, str(c.run_dir)) == (1e-5, "/runs/Big_Run.2")
    assert container["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-topology": "4x4"}


def test_with_vllm_every_pod_has_a_server():
    overrides = ("rollout.engine=vllm", "rollout.vllm.python=/opt/vllm/bin/python")
    done = printed("--nodes", "2", "--image", "i", "--claim", "d", *overrides)
    (container,) = check(yaml.safe_load(done.stdout))["containers"]
    c = load(ROOT / CONFIG, container["command"][5:])
    name = yaml.safe_load(done.stdout)["metadata"]["name"]
    assert list(c.rollout.vllm.urls) == [f"http://{name}-workers-0-{i}.{name}:8000" for i in range(2)]
    assert {"name": "VLLM_PYTHON", "value": "/opt/vllm/bin/python"} in container["env"]
    assert any(item["name"] == "VLLM_API_KEY" and "secretKeyRef" in item["valueFrom"] for item in container["env"])


def test_bad_arguments_are_refused_in_words():
    assert (
        "error: --limit gpu must be NAME=VALUE"
        in printed("--nodes", "1", "--image", "i", "--claim", "d", "--limit", "gpu").stderr
    )
    done = printed("--nodes", "1", "--image", "i", "--claim", "d", "actor.lr=1")
    assert done.returncode == 1 and re.match(r"error: configs/\S+: actor.lr is not a key", done.stderr)
