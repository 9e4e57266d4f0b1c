"""The whole run on a model of a few thousand weights: it learns, it resumes exactly, every choice works together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from jaxrl.config import from_dict
from jaxrl.loggers import Run, Samples
from jaxrl.parallel import make_mesh
from jaxrl.plan import check
from jaxrl.plan.programs import roles_of
from jaxrl.roles import Roles
from jaxrl.trainer import Trainer
from jaxrl.weights.folder import load_hf_config

ROOT = Path(__file__).parents[1]
MODEL = Path(__file__).parent / "data" / "hf_torch" / "llama32-tied"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+= "

# The share of a response that is the letter a: what a random model does not do and soon learns.
REWARD = """
def share_of_a(solution_str):
    return {"score": solution_str.count("a") / 6, "length": len(solution_str)}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The fixture with a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, folder)
    hf_config = json.loads((MODEL / "config.json").read_text())
    assert hf_config["vocab_size"] > len(LETTERS) + 2
    vocab = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    vocab |= {f"<{i}>": i for i in range(len(vocab), hf_config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf_config | {"eos_token_id": 1, "pad_token_id": 0}))
    return folder


@pytest.fixture
def settings(model, tmp_path):
    return settings_in(tmp_path, model)


def settings_in(tmp_path: Path, model: Path):
    """Makes configs as dicts, with `overrides` on top by dotted name."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{a}+{b}=", "data_source": "sums"} for a in range(6) for b in range(4)]
    for split, part in (("train", rows[:16]), ("val", rows[16:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))

    def make(name: str, **overrides) -> dict:
        tree = {
            "model": {"path": str(model), "compute_dtype": "float32"},
            "data": {
                "train_files": str(tmp_path / "train.jsonl"), "val_files": str(tmp_path / "val.jsonl"),
                "max_prompt_length": 8, "max_response_length": 6, "train_batch_size": 8,
            },
            "rollout": {"n": 4},
            "reward": {"functions": [{"name": f"{tmp_path}/reward.py:share_of_a"}]},
            "actor": {"ppo_mini_batch_size": 4, "ppo_max_token_len_per_gpu": 64, "optim": {"lr": 3e-3}},
            "critic": {"num_layers": 1, "ppo_max_token_len_per_gpu": 128, "optim": {"lr": 3e-3}},
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            "trainer": {
                "experiment_name": name, "run_dir": str(tmp_path / name), "row_length": 32, "total_training_steps": 2,
            },
        }  # fmt: skip
        for key, value in overrides.items():
            *sections, last = key.split("__")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = value
        return tree

    return make


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def numbers_of(row: dict) -> dict:
    """What must not depend on the machine's mood: all but times, memory and compilations."""
    return {name: x for name, x in row.items() if not name.startswith(("timing", "perf/"))}


def run(tree: dict) -> list[dict]:
    config = from_dict(tree)
    Trainer(config).fit()
    return metrics_of(config.run_dir)


def test_ppo_learns_and_leaves_a_folder_that_transformers_opens(settings, tmp_path, model):
    rows = run(settings("ppo", trainer__total_training_steps=16, trainer__test_freq=8))
    rewards = [row["critic/score/mean"] for row in rows[1:]]
    assert len(rewards) == 16
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3, rewards
    name = "val-core/sums/reward/mean@1"
    assert rows[16][name] > rows[0][name] + 0.3
    assert [row["step"] for row in rows if name in row] == [0, 8, 16]
    assert all(row["perf/recompiles"] == 0 for row in rows[3:]), [row.get("perf/recompiles") for row in rows]
    assert rows[1]["training/rollout_probs_diff_max"] < 1e-5  # engine and trainer agree
    assert rows[1]["reward/length/mean"] > 0
    assert all(row["perf/update_weights_gb"] > 0 and row["timing_s/update_weights"] > 0 for row in rows[1:])

    folder = tmp_path / "ppo"
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "reward.png",
        "hf",
    }
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["step"] == 16 and sample["split"] == "val" and sample["prompt"].endswith("=")

    torch = pytest.importorskip("torch")
    trained = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    ids = torch.tensor([[LETTERS.index(letter) + 2 for letter in "5+1="]])
    with torch.no_grad():
        answer = trained.generate(ids, max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    assert answer.count(LETTERS.index("a") + 2) >= 4, answer
    assert load_hf_config(folder / "hf")["model_type"] == load_hf_config(model)["model_type"]


def test_what_cannot_fit_on_these_devices_is_refused_before_a_weight_is_read(settings, monkeypatch):
    """By what lies there, which takes no compiling; and where that would fit, by the activations of the updates."""
    monkeypatch.setattr(Roles, "load", lambda *_, **__: pytest.fail("weights were read"))
    tree = settings("large", rollout__max_num_seqs=4, algorithm__adv_estimator="grpo")
    c = from_dict(tree)
    least = max(need.total for need in check.least_memory(c, roles_of(c, make_mesh(1, 1, 1))))
    for limit, when in ((least - 1, "generation"), (least, "the update")):
        monkeypatch.setattr(check, "_memory_of", lambda device, limit=limit: (limit, "a small one"))
        with pytest.raises(ValueError, match=f"this run cannot fit: {when} .* a small one has .* What helps"):
            Trainer(from_dict(tree))


def test_a_killed_run_goes_on_bit_for_bit(settings, tmp_path):
    """Killed by SIGKILL in the middle, with an adaptive KL coefficient and data in shuffled order."""
    same = {
        "trainer__total_training_steps": 5, "trainer__save_freq": 2, "algorithm__use_kl_in_reward": True,
        "algorithm__kl_ctrl": {"type": "adaptive", "kl_coef": 0.1, "horizon": 100},
    }  # fmt: skip
    whole = run(settings("whole", **same))
    assert len({row["actor/reward_kl_penalty_coeff"] for row in whole[1:]}) > 2  # the coefficient moves

    tree = settings("killed", **same)
    path = tmp_path / "killed.json"  # JSON is YAML
    path.write_text(json.dumps(tree))
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4):  # validation and three steps
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run(tree)
    assert [row["step"] for row in again] == [0, 1, 2, 3, 4, 5]
    for before, after in zip(whole, again, strict=True):
        assert numbers_of(before) == numbers_of(after)
    exports = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert exports[0] == exports[1]


def test_another_run_is_never_overwritten(settings, tmp_path):
    run(settings("first", trainer__total_training_steps=1))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"other settings \(actor.optim.lr was 0.003 and is 0.1\).*another name"):
        Trainer(from_dict(settings("first", trainer__total_training_steps=1, actor__optim={"lr": 0.1})))
    with pytest.raises(ValueError, match=r"already holds a run \(metrics.jsonl, .*hf\), and there is no checkpoint"):
        Trainer(from_dict(settings("first", trainer__total_training_steps=1)))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*") if path.is_file()}


def test_a_run_that_began_from_a_checkpoint_is_started_again_and_goes_back_in_its_own_folder(
    settings, tmp_path, capsys
):
    run(settings("origin", trainer__total_training_steps=2, trainer__save_freq=1))
    named = {
        "trainer__resume_mode": "resume_path", "trainer__save_freq": 1,
        "trainer__resume_from_path": str(tmp_path / "origin" / "checkpoints" / "global_step_1"),
    }  # fmt: skip
    assert [row["step"] for row in run(settings("branch", **named, trainer__total_training_steps=3))] == [2, 3]
    shutil.rmtree(tmp_path / "branch" / "hf")
    capsys.readouterr()
    again = run(settings("branch", **named, trainer__total_training_steps=4))  # the same command, with a step more
    assert [row["step"] for row in again] == [2, 3, 4]
    assert "Going on after step 3 of 4, from a checkpoint." in capsys.readouterr().out
    run(settings("branch", **named, trainer__total_training_steps=4))
    assert "nothing is left to train" in capsys.readouterr().out

    back = named | {"trainer__resume_from_path": str(tmp_path / "branch" / "checkpoints" / "global_step_2")}
    other = run(settings("branch", **back, trainer__total_training_steps=3))
    assert [row["step"] for row in other] == [2, 3]
    assert [numbers_of(row) for row in other] == [numbers_of(row) for row in again[:2]]
    on = run(
        settings("branch", **back, trainer__total_training_steps=4)
    )  # the same command goes on, and not back again
    assert "Going on after step 3 of 4" in capsys.readouterr().out
    assert [numbers_of(row) for row in on] == [numbers_of(row) for row in again]
    shutil.rmtree(tmp_path / "origin")  # what a run began from is needed no more
    run(settings("branch", **named, trainer__total_training_steps=4))


def test_the_actor_and_its_learning_rate_begin_when_the_critic_has_warmed_up(settings):
    optim = {"lr": 4e-3, "lr_scheduler_type": "linear", "lr_warmup_steps": 2}
    rows = run(settings("warm", data__val_files=None, trainer__critic_warmup=3, actor__optim=optim, critic__optim=optim,
                        trainer__total_training_steps=5))  # fmt: skip
    assert [row.get("actor/lr") for row in rows] == [None, None, 0.0, 2e-3, 4e-3]  # verl: from the step of that number
    assert rows[1]["critic/lr"] == 2e-3


@pytest.mark.parametrize("free", [True, False])
def test_the_engine_holds_its_weights_in_updates_where_it_is_told_to(settings, monkeypatch, free):
    trainer = Trainer(from_dict(settings("sleep", data__val_files=None, rollout__free_cache_engine=free)))
    updates, step = [], trainer.learner.step

    def looks(*args):
        updates.append(trainer.engine.weights is None)
        return step(*args)

    monkeypatch.setattr(trainer.learner, "step", looks)
    trainer.fit()
    assert updates == [free, free]


FAILS_HALF = """
def graded(solution_str, ground_truth, extra_info):
    if extra_info["index"] % 2:
        raise RuntimeError("no grade")
    return {"score": 1.0, "acc": 1.0, "reward": 7.0, "pred": solution_str[:1]}
"""


def test_a_sample_whose_reward_failed_counts_as_wrong_and_is_counted(settings, tmp_path):
    (tmp_path / "half.py").write_text(FAILS_HALF)
    tree = settings("half", reward={"functions": [{"name": f"{tmp_path}/half.py:graded"}]},
                    rollout__val_kwargs={"temperature": 1.0, "n": 2, "greedy": True},
                    trainer__total_training_steps=1)  # fmt: skip
    for split in ("train", "val"):
        path = tmp_path / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(r | {"extra_info": {"index": i}}) for i, r in enumerate(rows)))
    first, last = run(tree)
    assert last["reward/errors"] > 0 == last["reward/errors"] % 4  # all four responses to some prompts
    for row in (first, last):
        assert row["val-core/sums/acc/mean@2"] == 0.5 == row["val-core/sums/acc/mean@1"]
        assert row["val-aux/reward_errors"] == 8 + 4  # of sampled answers and of greedy ones
        assert row["val-aux/sums/reward/mean@2"] == 0.5  # the score, not the metric of that name
        assert row["val-core/sums/acc/maj@2/mean"] == 0.5


SOMETIMES = """
def graded(solution_str):
    return {"score": solution_str.count("a") / 6} | ({"digits": 1.0} if solution_str[:1] in "0123456789" else {})
"""


def test_a_validation_that_samples_and_answers_greedily_gives_the_numbers_of_either(settings, tmp_path):
    (tmp_path / "sometimes.py").write_text(SOMETIMES)
    reward = {"functions": [{"name": f"{tmp_path}/sometimes.py:graded"}]}

    def validate(name: str, **val_kwargs) -> tuple[dict, list[dict]]:
        trainer = Trainer(from_dict(settings(name, rollout={"val_kwargs": val_kwargs}, reward=reward)), trains=False)
        run = Run(tmp_path / name, "project", name, {}, epochs=1, steps=1, first_step=0)
        with closing(trainer.engine), trainer.scorer, closing(Samples(run)) as samples:
            trainer.engine.update_weights(trainer.roles.actor_variables(), 0)
            metrics = trainer.validate(0, samples)
        return metrics, [json.loads(line) for line in (tmp_path / name / "samples.jsonl").open()]

    greedy, greedy_rows = validate("greedy")
    sampled, sampled_rows = validate("sampled", n=4, temperature=1.0)
    both, rows = validate("both", n=4, temperature=1.0, greedy=True)
    of_few = "val-aux/sums/digits/mean@1"  # of samples: of prompts where one in four begins with a digit
    assert of_few in sampled and both.get(of_few) == greedy.get(of_few)
    assert both == {key: x for key, x in sampled.items() if key != of_few} | greedy
    name = "val-core/sums/reward"
    assert both[f"{name}/best@4/mean"] > both[f"{name}/mean@4"] != both[f"{name}/mean@1"]
    assert rows == sampled_rows + [row | {"split": "val_greedy"} for row in greedy_rows]


def test_kl_with_coefficient_0_is_watched_and_moves_nothing(settings):
    same = {"data__val_files": None, "trainer__total_training_steps": 2}
    plain, watched = (
        run(settings(name, **same, **changes))
        for name, changes in (("plain", {}), ("watched", {"actor__use_kl_loss": True, "actor__kl_loss_coef": 0.0}))
    )
    assert watched[1]["actor/kl_loss"] > 0 and "actor/kl_loss" not in plain[1]
    assert watched[1]["actor/grad_norm"] == pytest.approx(plain[1]["actor/grad_norm"], rel=1e-5)


def test_what_goes_wrong_while_training_is_one_sentence_with_the_log_that_says_more(settings, tmp_path):
    tree = settings("raises", reward={"functions": [{"name": f"{tmp_path}/raises.py:always"}], "on_error": "raise"})
    (tmp_path / "raises.py").write_text("def always(solution_str):\n    raise RuntimeError('out of grades')\n")
    path = tmp_path / "raises.json"
    path.write_text(json.dumps(tree))
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(path)]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "error: reward " in ended.stderr and "out of grades" in ended.stderr
    log = tmp_path / "raises" / "logs" / "process_0.log"
    assert f"({log} holds the traceback)" in ended.stderr and "Traceback" in log.read_text()


def test_a_disk_that_cannot_be_written_is_named_in_one_sentence(settings, tmp_path):
    path = tmp_path / "unwritable.json"
    path.write_text(json.dumps(settings("unwritable", trainer__run_dir="/proc/run")))
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(path)]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "error: " in ended.stderr and "/proc" in ended.stderr


@pytest.mark.parametrize("script", ["train", "plan", "doctor", "serve_vllm", "convert_checkpoint", "prepare_data"])
def test_every_script_helps(script):
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
    shown = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0 and "usage:" in shown.stdout and len(shown.stdout) > 300


CHOICES = {
    "grpo with a KL loss and adapters": {
        "algorithm__adv_estimator": "grpo", "actor__use_kl_loss": True, "model__lora_rank": 4,
        "actor__ppo_mini_batch_size": 8, "actor__loss_agg_mode": "seq-mean-token-mean",
    },
    "remax with gspo": {"algorithm__adv_estimator": "remax", "actor__policy_loss": {"loss_mode": "gspo"}},
    "rloo with corrections and top-p": {
        "algorithm__adv_estimator": "rloo", "rollout__top_p": 0.9, "rollout__temperature": 0.8,
        "algorithm__rollout_correction": {"rollout_is": "token", "rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_2"},
    },
    "ppo in two epochs with bypass and an unshared prompt": {
        "actor__ppo_epochs": 2, "algorithm__rollout_correction": {"bypass_mode": True}, "trainer__share_prompt": False,
        "actor__entropy_coeff": 0.01, "trainer__critic_warmup": 2,
    },
    "all that can wait in host memory, on a mesh, and generation in another layout": {
        "actor__offload": ["optimizer", "params"], "critic__offload": ["optimizer", "params"], "ref__offload": ["params"],
        "actor__use_kl_loss": True, "model__remat": "offload", "model__shard_tokens": "blocks",
        "mesh__data": 2, "mesh__fsdp": 1, "mesh__tensor": 2, "rollout__tensor_model_parallel_size": 1,
        "trainer__save_freq": 2,
    },
    "all that can wait in host memory, on one device, in bfloat16": {
        "actor__offload": ["optimizer", "params"], "critic__offload": ["optimizer", "params"],
        "actor__param_dtype": "bfloat16", "critic__param_dtype": "bfloat16", "trainer__save_freq": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_choices_work_together(settings, name):
    rows = run(settings("choices", data__val_files=None, **CHOICES[name]))
    last = rows[-1]
    assert last["step"] == 2
    assert np.isfinite(list(numbers_of(last).values())).all()
    assert last["actor/grad_norm"] > 0
    if "KL loss" in name:
        assert (
            rows[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-4) and last["actor/kl_loss"] > rows[0]["actor/kl_loss"]
        )
    if "corrections" in name:
        # Top-p is accounted for: what is left is float32 rounding.
        assert last["training/rollout_probs_diff_max"] < 1e-4 and last["rollout_corr/rollout_is_max"] < 1.001
        assert "rollout_corr/rollout_is_mean" in last and "rollout_corr/rollout_rs_token_k1_mean" in last
    if "bypass" in name:
        assert "actor/grad_norm" not in rows[0]  # the critic warms up
        assert (
            last["training/rollout_probs_diff_max"] < 1e-4 < 0.999 < last["training/rollout_actor_probs_pearson_corr"]
        )


def test_each_role_computes_and_keeps_its_weights_as_it_is_told(settings):
    told = {
        "critic__compute_dtype": "bfloat16", "critic__remat": "full", "critic__param_dtype": "bfloat16",
        "ref__compute_dtype": "bfloat16",
    }  # fmt: skip
    one_update = {"trainer__total_training_steps": 1, "actor__ppo_mini_batch_size": 8, "actor__use_kl_loss": True}
    trainer = Trainer(from_dict(settings("dtypes", data__val_files=None, **one_update, **told)))
    roles = trainer.roles
    assert (roles.model.compute_dtype, roles.model.remat) == ("float32", "none")
    assert (roles.critic.config.compute_dtype, roles.critic.config.remat) == ("bfloat16", "full")
    trainer.fit()
    assert {x.dtype.name for x in jax.tree.leaves(roles.ref)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(roles.actor.trained)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(roles.critic_state.trained)} == {"bfloat16"}
    (row,) = metrics_of(trainer.config.run_dir)
    assert 1e-7 < row["actor/kl_loss"] < 1e-2  # what bfloat16 makes of the same weights
    assert row["critic/grad_norm"] > 0


def test_a_mesh_of_eight_devices_takes_the_same_step(settings):
    one = run(settings("one", data__val_files=None, trainer__total_training_steps=1))[0]
    many = run(settings("many", data__val_files=None, trainer__total_training_steps=1,
                        mesh={"data": 2, "fsdp": 2, "tensor": 2}))[0]  # fmt: skip
    for name in ("critic/score/mean", "actor/grad_norm", "actor/pg_loss", "actor/entropy", "critic/vf_loss"):
        assert many[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), name


def test_each_role_has_a_mesh_of_its_own_and_a_run_goes_on_with_other_ones(settings):
    same = {"data__val_files": None, "actor__use_kl_loss": True, "trainer__save_freq": 1}
    one = run(settings("one", **same))
    meshes = {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "critic__mesh": {"data": 8, "fsdp": 1},
        "ref__mesh": {"fsdp": 4, "tensor": 2},
    }  # fmt: skip
    trainer = Trainer(from_dict(settings("many", **same, **meshes, trainer__total_training_steps=1)))
    shapes = [
        dict(mesh.shape) for mesh in (trainer.roles.mesh, trainer.roles.critic.mesh, trainer.roles.ref_policy.mesh)
    ]
    assert shapes == [dict(zip(("data", "fsdp", "tensor"), s, strict=True)) for s in ((2, 2, 2), (8, 1, 1), (1, 4, 2))]
    trainer.fit()
    held = [jax.tree.leaves(x)[0].sharding.mesh for x in (trainer.roles.critic_state, trainer.roles.ref)]
    assert held == [trainer.roles.critic_mesh, trainer.roles.ref_mesh]
    shutil.rmtree(trainer.config.run_dir / "hf")
    many = run(
        settings("many", **same, mesh={"data": 1, "fsdp": 4, "tensor": 1}, critic__mesh={"tensor": 2, "fsdp": 2})
    )
    for ours, expected in zip(many, one, strict=True):
        for name in ("critic/score/mean", "actor/grad_norm", "actor/pg_loss", "actor/kl_loss", "critic/vf_loss"):
            assert ours[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-6), name


def test_a_folder_of_splits_is_read_by_split(settings, tmp_path):
    tree = settings("splits")
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "val"):
        shutil.copy(tmp_path / f"{split}.jsonl", folder)
        tree["data"] |= {f"{split}_files": str(folder), f"{split}_kwargs": {"split": split}}
    trainer = Trainer(from_dict(tree))
    assert (len(trainer.loader.dataset), len(trainer.val)) == (16, 8)


USER_ESTIMATOR = """
def reward_minus_value(rewards, mask, *, values):
    advantages = (rewards.sum(axis=1, keepdims=True) - values) * mask
    return advantages, advantages + values
"""


def test_a_users_estimator_that_names_values_gets_a_critic(settings, tmp_path):
    (tmp_path / "mine.py").write_text(USER_ESTIMATOR)
    estimator = f"{tmp_path}/mine.py:reward_minus_value"
    rows = run(settings("mine", algorithm__adv_estimator=estimator, trainer__total_training_steps=1))
    assert rows[1]["critic/vf_loss"] > 0 and rows[1]["actor/grad_norm"] > 0


MINE = """
def loss(logprobs, advantages): ...
def estimator(rewards): ...
def rows():
    row = {}
    yield {"prompt": row["question"]}
"""


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("actor__loss_agg_mode", "token_mean", "Unknown actor.loss_agg_mode 'token_mean'. Did you mean 'token-mean'"),
        ("algorithm__adv_estimator", "gea", "Unknown algorithm.adv_estimator 'gea'. Did you mean 'gae'"),
        ("trainer__logger", ["wanbd"], "Unknown trainer.logger 'wanbd'. Did you mean 'wandb'"),
        ("rollout__top_p", 1.5, r"rollout\.top_p 1.5: set it above 0 and at most 1"),
        (
            "rollout__val_kwargs",
            {"top_k": 0, "temperature": 1.0},
            r"rollout\.val_kwargs\.top_k 0: set 1 or more, or -1",
        ),
        (
            "model__attention",
            "cudnn",
            "model.attention cudnn is a kernel of a gpu, and the devices here are of kind cpu",
        ),
        ("data__max_response_length", 500, "= 508 is more than the 64 tokens of the context"),
        ("data__train_files", "nowhere.parquet", "there is no file nowhere.parquet"),
        ("data__prompt_key", "question", "question"),
        ("model__path", "no/such/folder/here", "model path no/such/folder/here does not exist"),
        (
            "critic__mesh",
            {"fsdp": 3},
            "critic.mesh 1x3x1 takes 3 of the 1 devices|critic.mesh: mesh 1x3x1 needs 3 devices",
        ),
        (
            "actor__policy_loss",
            {"loss_mode": "MINE:loss"},
            r"is called with \(logprobs, old_logprobs, advantages, mask\)",
        ),
        ("algorithm__adv_estimator", "MINE:estimator", r"is called with \(rewards, mask\)"),
        ("data__train_files", "MINE:rows", r"failed: KeyError: 'question' \(mine.py, line 6\)"),
        ("trainer__run_dir", "MINE/run", "the run's folder .*mine.py/run would be in .*mine.py, and that is no folder"),
        ("ref__compute_dtype", "float16", "ref.compute_dtype is 'float16' and must be one of None, bfloat16, float32"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(settings, tmp_path, key, value, sentence):
    (tmp_path / "mine.py").write_text(MINE)
    value = json.loads(json.dumps(value).replace("MINE", f"{tmp_path}/mine.py"))  # a file
    room = {f"{role}__ppo_max_token_len_per_gpu": 1024 for role in ("actor", "critic")}
    tree = settings("bad", trainer__row_length=None, **room, **{key: value})
    with pytest.raises(ValueError, match=sentence):
        Trainer(from_dict(tree))
    assert not (tmp_path / "bad").exists()
