"""Runs of several real processes (gloo, on this machine): they equal a run of one, and the death of one is survived.

Each run is PPO with a critic on four devices in a mesh of 1 x 2 x 2, divided among its processes, and all take the same
steps to the last bit: every sum over devices has two terms, whose order does not matter.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_link import free_port
from test_trainer import model, numbers_of, settings  # noqa: F401 (fixtures)
from vllm_stub import stub_python
from xla_flags import QUICK

from jaxrl.config import from_dict
from jaxrl.preemption import EXIT_CODE
from jaxrl.trainer import Trainer

ROOT = Path(__file__).parents[1]
LOCAL = [sys.executable, str(ROOT / "scripts" / "launch" / "local.py")]
STEPS = 10

# Takes its time, so that a step can be caught; says who scored what.
REWARD = """
import os, time

def share_of_a(solution_str):
    time.sleep(0.03)
    with open(os.environ["SCORED"], "a") as file:
        file.write(f"{os.getppid()}\\n")
    return solution_str.count("a") / 6
"""


class Launched(NamedTuple):
    """`local.py` with a run in `folder`."""

    popen: subprocess.Popen
    folder: Path
    output: Path

    def wait_for(self, step: int) -> None:
        """Until metrics.jsonl has a step."""
        metrics = self.folder / "metrics.jsonl"
        deadline = time.monotonic() + 400
        while not (metrics.exists() and f'{{"step": {step},' in metrics.read_text()):
            assert self.popen.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def pid(self, process_id: int) -> int:
        log = (self.folder / "logs" / f"process_{process_id}.log").read_text()
        return int(re.findall(rf"process {process_id} \(host \S+, pid (\d+)\) of", log)[-1])

    def ended(self, within_s: float = 400) -> tuple[int, str]:
        """Exit code and all that was printed."""
        try:
            return self.popen.wait(timeout=within_s), self.output.read_text()
        finally:
            if self.popen.poll() is None:
                self.popen.kill()


@pytest.fixture
def launch(settings, tmp_path):  # noqa: F811
    """Starts a run by its name with a number of processes; the same name goes on with the same run."""

    def start(name: str, num_processes: int, **overrides) -> Launched:
        tree = settings(name, **{
            "data__val_files": None, "trainer__total_training_steps": STEPS, "trainer__save_freq": 1,
            "trainer__heartbeat_timeout_s": 6.0, "trainer__max_ckpt_to_keep": 2, "actor__use_kl_loss": True,
            "mesh": {"data": 1, "fsdp": 2, "tensor": 2}, **overrides,
        })  # fmt: skip
        (tmp_path / "reward.py").write_text(REWARD)
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))  # JSON is YAML
        command = [*LOCAL, "-n", str(num_processes), "--devices", str(4 // num_processes)]
        # The flags make XLA compile in half the time; conftest's eight devices are not for these runs.
        flags = f"{QUICK} --xla_backend_optimization_level=0"
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{flags} --xla_llvm_disable_expensive_passes=true",
            "SCORED": str(tmp_path / f"{name}.scored"),
        }  # fmt: skip
        output = tmp_path / f"{name}.txt"
        with output.open("w") as file:
            popen = subprocess.Popen(
                [*command, "--config", str(tmp_path / f"{name}.json")], env=environment, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        return Launched(popen, tmp_path / name, output)

    return start


def outcome(folder: Path) -> tuple[list[dict], bytes]:
    """What a run must not owe to its processes: the metrics but for times and memory, and the exported bytes."""
    rows = [numbers_of(json.loads(line)) for line in (folder / "metrics.jsonl").open()]
    return rows, (folder / "hf" / "model.safetensors").read_bytes()


def test_any_number_of_processes_takes_the_same_steps_and_a_dead_one_is_survived(launch, tmp_path):
    one = launch("one", 1)
    assert one.ended()[0] == 0, one.output.read_text()

    two = launch("two", 2)
    code, text = two.ended()
    assert code == 0, text
    assert outcome(two.folder) == outcome(one.folder)
    # Each sample was scored once, and both processes had their part.
    scorers = Counter((tmp_path / "two.scored").read_text().split())
    assert sorted(scorers.values()) == [16 * STEPS, 16 * STEPS]
    assert {path.name for path in (two.folder / "logs").iterdir()} == {"process_0.log", "process_1.log"}
    assert f"step {STEPS} of {STEPS} took" in (two.folder / "logs" / "process_1.log").read_text()
    assert text.count("] step ") == STEPS  # printed by one process
    state = two.folder / "checkpoints" / f"global_step_{STEPS}" / "state"
    assert all((state / f"ocdbt.process_{i}").is_dir() for i in (0, 1))  # each wrote its part
    assert len((two.folder / "samples.jsonl").read_text().splitlines()) == 32 * STEPS

    four = launch("four", 4)
    four.wait_for(3)
    pid = four.pid(1)
    os.kill(pid, signal.SIGSTOP)
    code, text = four.ended(within_s=60)
    assert code == 128 + signal.SIGKILL and "did not answer any more and was killed" in text
    news = rf"error: process 1 \(host \S+, pid {pid}\) has not been heard of for 6 s; the last step it finished was \d"
    for i in (0, 2, 3):
        assert re.search(rf"\[{i}\] {news}\. This is process {i} .* go on from the last checkpoint", text), text

    four = launch("four", 4)
    four.wait_for(6)
    pid = four.pid(3)
    os.kill(pid, signal.SIGKILL)
    code, text = four.ended(within_s=60)
    assert code == 128 + signal.SIGKILL and re.search(r"error: process 3 on \S+ was killed by SIGKILL", text)
    news = rf"error: process 3 \(host \S+, pid {pid}\) has died: its connection was closed; the last step it finished was \d"
    for i in (0, 1, 2):
        assert re.search(rf"\[{i}\] {news}", text), text

    two = launch("four", 2)  # a checkpoint of four processes, on two; and they are preempted
    two.wait_for(8)
    two.popen.send_signal(signal.SIGTERM)
    code, text = two.ended()
    assert code == EXIT_CODE, text
    saved = int(re.search(r"SIGTERM: saved step (\d+)", text)[1])
    assert saved in (8, 9) and (two.folder / "checkpoints" / f"global_step_{saved}" / "commit_success.txt").exists()

    four = launch("four", 4)
    code, text = four.ended()
    assert code == 0, text
    assert f"] step {saved + 1:>2}/{STEPS}" in text and f"] step {saved:>2}/{STEPS}" not in text
    assert outcome(four.folder) == outcome(one.folder)


def test_one_step_off_with_servers_is_the_same_on_a_mesh_of_one_process_and_of_two(launch, tmp_path):
    reward = "def sixes(solution_str):\n    return solution_str.count('e') / 6\n"  # of the tokens 5 and 6, d and e
    (tmp_path / "sixes.py").write_text(reward)
    env = {"DRAWS": "1", "PAUSE_S": "0.2"}  # so that generation takes longer than the updates
    vllm = {"python": stub_python(tmp_path), "num_servers": 2, "env": env, "probe_tolerance": 1e3}
    one_step_off = {
        "rollout__engine": "vllm", "rollout__vllm": vllm, "trainer__trainer_mode": "one_step_off",
        "trainer__total_training_steps": 3, "trainer__save_freq": -1, "algorithm__adv_estimator": "grpo",
        "algorithm__rollout_correction": {"rollout_is": "token"},
        "reward": {"functions": [{"name": f"{tmp_path}/sixes.py:sixes"}]},
    }  # fmt: skip
    runs = [launch(name, n, **one_step_off) for name, n in (("one", 1), ("two", 2))]
    for run in runs:
        code, text = run.ended()
        assert code == 0, text
    one, two = (outcome(run.folder) for run in runs)
    assert one == two
    rows = [json.loads(line) for line in (runs[1].folder / "metrics.jsonl").open()]
    assert [row["training/staleness"] for row in rows] == [0, 1, 1]
    assert all(row["actor/grad_norm"] > 0 for row in rows) and all(row["perf/overlap_s"] > 0 for row in rows[:-1])


READ = """
import sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jaxrl.cluster import Place
from jaxrl.config import from_dict
from jaxrl.distributed import start
from jaxrl.models.config import ModelConfig
from jaxrl.parallel import make_mesh
from jaxrl.roles import abstract_variables
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.load import load_hf_config, load_params

address, process_id, model = sys.argv[1], int(sys.argv[2]), sys.argv[3]
c = from_dict({"model": {"path": model}, "data": {"train_files": "none"}, "trainer": {"experiment_name": "read"},
               "reward": {"functions": [{"name": "exact_number"}]}})
with start(Place(address, 2, process_id), c):
    checkpoint, config = open_checkpoint(model), ModelConfig.from_hf(load_hf_config(model))
    abstract = abstract_variables(make_mesh(1, 2, 1), config, "lm")["params"]
    params = load_params(checkpoint, config, abstract)
    size = checkpoint.tensors["model.embed_tokens.weight"].dtype.itemsize
    mine = sum(shard.data.size * size for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    total = sum(x.size * size for x in jax.tree.leaves(params))
    whole = multihost_utils.process_allgather(params["embed_tokens"]["embedding"], tiled=True)
    assert np.array_equal(whole, checkpoint.read("model.embed_tokens.weight", (slice(None), slice(None))))
    print("read", mine, checkpoint.bytes_read - whole.size * size, total, flush=True)
"""


def test_each_process_reads_only_its_slices_of_a_checkpoint(model):  # noqa: F811
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ, address, str(i), str(model)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=200)
        mine, read, total = map(int, re.search(r"read (\d+) (\d+) (\d+)", out).groups())
        assert read == mine < 0.6 * total, out


SIGTERM_ONCE = """
import os, pathlib, signal

def share_of_a(solution_str):
    flag = pathlib.Path(__file__).with_name("sent")
    if not flag.exists():
        flag.touch()
        os.kill(os.getppid(), signal.SIGTERM)
    return solution_str.count("a") / 6
"""


def test_sigterm_saves_a_checkpoint_and_the_run_goes_on_from_it(settings, tmp_path):  # noqa: F811
    before = signal.getsignal(signal.SIGTERM)
    same = {"data__val_files": None, "algorithm__adv_estimator": "grpo", "trainer__total_training_steps": 2}
    tree = settings("preempted", **same)
    (tmp_path / "reward.py").write_text(SIGTERM_ONCE)
    with pytest.raises(SystemExit) as ended:
        Trainer(from_dict(tree)).fit()
    assert ended.value.code == EXIT_CODE and signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "preempted" / "hf").exists()
    trainer = Trainer(from_dict(tree))
    assert trainer.start == (str(tmp_path / "preempted" / "checkpoints"), 1)
    trainer.fit()
    assert [json.loads(line)["step"] for line in (tmp_path / "preempted" / "metrics.jsonl").open()] == [1, 2]
    Trainer(from_dict(settings("whole", **same))).fit()
    rows, exported = outcome(tmp_path / "preempted")
    assert (rows, exported) == outcome(tmp_path / "whole")
    assert np.isfinite(rows[-1]["actor/grad_norm"])


def test_a_mesh_larger_than_the_devices_is_refused_by_every_process(launch, tmp_path):
    run = launch("large", 2)
    run.popen.kill()  # the config is what is wanted of it
    run.popen.wait()
    command = [*LOCAL, "-n", "2", "--devices", "1", "--config", str(tmp_path / "large.json")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1
    for i in (0, 1):
        assert f"[{i}] error: mesh 1x2x2 needs 4 devices and there are 2" in done.stdout
    assert not run.folder.exists()


def test_hosts_with_another_config_or_no_coordinator_are_refused_before_anything_is_loaded(settings, tmp_path):  # noqa: F811
    config = tmp_path / "disagree.json"
    config.write_text(json.dumps(settings("disagree", trainer__start_timeout_s=60)))
    train = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(config), "--num-processes", "2"]
    address = f"127.0.0.1:{free_port()}"

    def start(process_id: int, override: str) -> subprocess.Popen:
        command = [*train, override, "--coordinator", address, "--process-id", str(process_id)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for process in [start(0, "actor.optim.lr=1e-6"), start(1, "actor.optim.lr=1e-5")]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert re.fullmatch(
            r"error: process 1 \(host \S+, pid \d+\) and process 0 \(.*\) do not agree on the config: actor.optim.lr is "
            r"1e-05 on the one and 1e-06 on the other.*\n",
            errors,
        ), errors
    alone = start(1, "trainer.start_timeout_s=0.5")
    assert "could not reach the coordinator 127.0.0.1:" in alone.communicate(timeout=120)[1]
    assert alone.returncode == 1 and not (tmp_path / "disagree").exists()
