"""Launchers: processes that end together, the one that failed by name, and what is run on each host."""

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrl.config import load
from jaxrl.link import PEER_LOST
from jaxrl.preemption import EXIT_CODE

ROOT = Path(__file__).parents[1]
GROUP = """
import sys
from jaxrl.launching import Member, wait
sys.exit(wait(Member(str(i), f"process {i}", ["bash", "-c", code]) for i, code in enumerate(sys.argv[1:])))
"""


def group(*commands: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", GROUP, *commands], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("commands", "code", "verdict"),
    [
        (["echo one", "echo two"], 0, ""),
        (["exit 3", f"sleep 0.3; exit {PEER_LOST}"], 3, "error: process 0 ended with exit code 3; the run has ended\n"),
        ([f"exit {PEER_LOST}", "sleep 0.3; kill -KILL $$"], 137, "error: process 1 was killed by SIGKILL; the run has ended\n"),
        ([f"exit {PEER_LOST}", "kill -STOP $$"], 137, "error: process 1 did not answer any more and was killed"),
        (["exit 255", "sleep 100"], 255, "error: process 0 could not be reached, or its connection broke"),
    ],
)  # fmt: skip
def test_the_first_that_ends_badly_ends_the_others_and_is_named(commands, code, verdict):
    start = time.monotonic()
    process = group(*commands)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors[: len(verdict)]) == (code, verdict)
    assert time.monotonic() - start < 100
    if not code:
        assert sorted(out.splitlines()) == ["[0] one", "[1] two"]


def test_sigterm_is_handed_on_and_is_no_failure():
    saves = f"trap 'echo saved; exit {EXIT_CODE}' TERM; echo ready; while :; do sleep 0.1; done"
    process = group(saves, saves)
    assert process.stdout is not None
    assert [process.stdout.readline().split()[1] for _ in range(2)] == ["ready", "ready"]
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (EXIT_CODE, "")
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


# In ssh's place: runs the command here, as the shell of the host would, and knows one host that is down.
SSH = """#!/usr/bin/env bash
[ "$1" = down ] && { echo "ssh: connect to host down port 22: No route to host" >&2; exit 255; }
exec sh -c "$2"
"""
# In gcloud's place, for a pod of two workers.
GCLOUD = """#!/usr/bin/env bash
case $* in
    *"describe pod --zone=z"*) echo 2 ;;
    *describe*) echo "ERROR: NOT_FOUND" >&2; exit 1 ;;
    *--command=*) last="${@: -1}"; exec sh -c "${last#--command=}" ;;
esac
"""
# In the place of the Python of the host: says what it was asked to do.
PYTHON = """#!/usr/bin/env bash
echo "key ${#VLLM_API_KEY} in $PWD: ${@:2}"
case $* in
    *fail=1*"--process-id 1"*) exit 5 ;;
    *wait=1*) trap 'echo saved; exit 143' TERM; echo waiting; while :; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def remote(tmp_path):
    """Starts ssh.sh or tpu_pod.sh with the stand-ins above."""
    for name, content in (("ssh", SSH), ("gcloud", GCLOUD), ("python", PYTHON)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run here").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "SSH": str(tmp_path / "ssh"), "GCLOUD": str(tmp_path / "gcloud"),
        "JAXRL_DIR": str(tmp_path / "run here"), "VLLM_API_KEY": "secret",
    }  # fmt: skip

    def start(script: str, *arguments: str) -> subprocess.Popen:
        # The launcher itself runs with this Python, the hosts with the stand-in.
        command = f"PYTHON={shlex.quote(str(tmp_path / 'python'))} exec {sys.executable} scripts/launch/remote.py"
        launcher = (ROOT / "scripts" / "launch" / script).read_text().splitlines()[-1]
        kind = launcher.split()[-2]
        return subprocess.Popen(
            ["bash", "-c", f"{command} {kind} {shlex.join(arguments)}"], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def test_ssh_starts_every_host_with_its_number(remote, tmp_path):
    (tmp_path / "hosts").write_text("# two hosts\nme@first\nsecond  # the other\n")
    process = remote("ssh.sh", str(tmp_path / "hosts"), "--config", "c.yaml", "data.system_prompt=it's a b")
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    arguments = (
        "scripts/launch/host.py --config c.yaml data.system_prompt=it's a b --num-processes 2 --coordinator first:8476"
    )
    where = f"key 6 in {tmp_path}/run here"
    assert sorted(out.splitlines()) == [
        f"[me@first] {where}: {arguments} --process-id 0",
        f"[second] {where}: {arguments} --process-id 1",
    ]


def test_ssh_names_the_host_that_failed_or_is_down(remote, tmp_path):
    (tmp_path / "hosts").write_text("first\nsecond\n")
    process = remote("ssh.sh", str(tmp_path / "hosts"), "--config", "c.yaml", "fail=1")
    assert "error: host second ended with exit code 5; the run has ended" in process.communicate(timeout=120)[1]
    (tmp_path / "hosts").write_text("first\ndown\n")
    process = remote("ssh.sh", str(tmp_path / "hosts"), "--config", "c.yaml")
    out, errors = process.communicate(timeout=120)
    assert "[down] ssh: connect to host down port 22: No route to host" in out
    assert "error: host down could not be reached" in errors and process.returncode == 255


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_launcher_is_a_preemption_of_the_hosts(remote, tmp_path, signum):
    (tmp_path / "hosts").write_text("first\nsecond\n")
    process = remote("ssh.sh", str(tmp_path / "hosts"), "--config", f"{tmp_path}/c.yaml", "wait=1")
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(4)]
    assert sum("waiting" in line for line in seen) == 2
    process.send_signal(signum)
    out, _ = process.communicate(timeout=120)
    if signum == signal.SIGTERM:
        assert process.returncode == EXIT_CODE and sorted(out.splitlines()) == ["[first] saved", "[second] saved"]
    deadline = time.monotonic() + 20
    while f"{tmp_path}/c.yaml" in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, "the hosts run on"
        time.sleep(0.1)


def test_a_tpu_pod_is_started_on_each_of_its_workers(remote, tmp_path):
    process = remote("tpu_pod.sh", "pod", "z", "--config", "c.yaml")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert sorted(line.partition(":")[0] for line in out.splitlines()) == [
        f"[pod worker {i}] key 6 in {tmp_path}/run here" for i in range(2)
    ]
    assert out.count("scripts/launch/host.py --config c.yaml --coordinator tpu") == 2
    process = remote("tpu_pod.sh", "no-pod", "z", "--config", "c.yaml")
    assert (
        "error: gcloud does not know the TPU VM no-pod in zone z: ERROR: NOT_FOUND"
        in process.communicate(timeout=120)[1]
    )


def test_a_host_file_that_is_not_there_is_said(remote):
    process = remote("ssh.sh", "nowhere", "--config", "c.yaml")
    assert process.communicate(timeout=120)[1] == "error: the host file nowhere is not there: write one host a line\n"
    assert process.returncode == 1


HOST = ROOT / "scripts" / "launch" / "host.py"
BESIDE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("host", {str(HOST)!r})
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
shell = lambda code: ["bash", "-c", code]
sys.exit(host.run(shell(sys.argv[1]), [(f"http://here:{{i}}", shell(code)) for i, code in enumerate(sys.argv[2:])]))
"""


def test_a_host_starts_the_vllm_servers_that_the_config_puts_on_it(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("host", HOST)
    assert spec is not None and spec.loader is not None
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    (tmp_path / "config.json").write_text("{}")
    urls = "[http://127.0.0.1:8001,http://no.such.host.invalid:8001,http://localhost:8002]"
    overrides = [f"model.path={tmp_path}", "rollout.engine=vllm", f"rollout.vllm.urls={urls}"]
    config = ROOT / "configs" / "ppo_gsm8k_qwen2_7b.yaml"
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set VLLM_API_KEY"):
        host.server_commands(load(config, overrides))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_PYTHON", "/opt/vllm/bin/python")
    servers = host.server_commands(load(config, overrides))
    assert [url for url, _ in servers] == ["http://127.0.0.1:8001", "http://localhost:8002"]
    command = servers[1][1]
    assert command[:3] == ["/opt/vllm/bin/python", str(ROOT / "scripts" / "serve_vllm.py"), str(tmp_path)]
    assert command[command.index("--port") + 1] == "8002"
    known = subprocess.run([sys.executable, command[1], "--help"], capture_output=True, text=True).stdout
    assert all(flag in known for flag in command if flag.startswith("--"))
    assert host.server_commands(load(config, [f"model.path={tmp_path}"])) == []


@pytest.mark.parametrize(
    ("trainer", "server", "code", "verdict"),
    [
        ("exit 0", "exec sleep 100", 0, ""),
        ("exit 3", "exec sleep 100", 3, ""),  # it said why itself
        (
            "exec sleep 100",
            "exit 4",
            4,
            "error: vLLM server http://here:0 on {host} ended with exit code 4; the run ends",
        ),
    ],
)
def test_trainer_and_servers_of_a_host_end_together(trainer, server, code, verdict):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, trainer, server], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (code, verdict.format(host=socket.gethostname()))
    assert time.monotonic() - start < 100
