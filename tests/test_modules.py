"""A user's own Flax module as critic or reward model: its names, its gradient, and the heads of other libraries."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from letters import add_tokenizer, metrics_of, settings
from safetensors.numpy import load_file, save_file

from jaxrl.config import Head, Model, from_dict
from jaxrl.parallel import make_mesh
from jaxrl.reward_model import RewardModel
from jaxrl.rewards import Sample
from jaxrl.roles import abstract_variables, load_base, model_config
from jaxrl.trainer import Trainer
from jaxrl.weights.folder import load_hf_config
from jaxrl.weights.pretrained import open_pretrained

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
MODULE = f"{ROOT}/examples/phi3_reward.py:Phi3WithReward"


@pytest.fixture(scope="module")
def phi3(tmp_path_factory) -> Path:
    """A Phi-3 whose checkpoint holds a reward head beside its language-model output."""
    folder = tmp_path_factory.mktemp("phi3") / "reward"
    shutil.copytree(DATA / "hf_torch" / "phi3", folder)
    tensors = load_file(folder / "model.safetensors")
    size = load_hf_config(folder)["hidden_size"]
    tensors["reward_head.weight"] = np.random.default_rng(0).normal(size=(1, size)).astype(np.float32)
    tensors["reward_head.bias"] = np.array([0.25], np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    add_tokenizer(folder)
    return folder


def hidden_of_transformers(folder: Path, ids: list[int]):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model.model(torch.tensor([ids])).last_hidden_state[0].numpy()


def test_reward_of_phi3_with_a_head_of_its_own_is_that_of_the_last_hidden_state(phi3):
    model = Model(path=str(phi3), compute_dtype="float32")
    rewarder = RewardModel(str(phi3), make_mesh(1, 1, 1), model, max_tokens=256, head=Head(module=MODULE))
    rewarder.load()
    assert {"lm_head", "reward_head"} <= rewarder.variables["params"].keys()
    sample = Sample("1+1=", "2", "2", "sums", {}, 1, True)
    (score,) = rewarder.score([sample])
    ids = rewarder.tokenizer("1+1=2")["input_ids"]
    head = load_file(phi3 / "model.safetensors")["reward_head.weight"][0]
    expected = hidden_of_transformers(phi3, ids)[-1] @ head + 0.25
    assert score.reward == pytest.approx(expected, abs=2e-4)  # float32, another order of sums


def test_gradient_flows_through_a_critic_of_ones_own_and_it_is_exported_under_its_own_names(phi3, tmp_path):
    actor = shutil.copytree(DATA / "hf_torch" / "phi3", tmp_path / "actor")
    add_tokenizer(actor)
    tree = settings(tmp_path / "run", algorithm={"adv_estimator": "gae"})
    tree["model"]["path"] = str(actor)
    tree["critic"] = {
        "path": str(phi3), "head": {"module": MODULE}, "export": True, "ppo_max_token_len_per_gpu": 128,
        "optim": {"lr": 1e-2},
    }  # fmt: skip
    Trainer(from_dict(tree)).fit()
    before, after = (load_file(folder / "model.safetensors") for folder in (phi3, tmp_path / "run" / "critic"))
    assert before.keys() == after.keys()
    for name in ("reward_head.weight", "reward_head.bias", "model.layers.0.mlp.down_proj.weight"):
        assert np.abs(after[name] - before[name]).max() > 1e-3, name
    # Nothing but weight decay, 1e-4 in each of four updates, moves what the value does not depend on.
    np.testing.assert_allclose(after["lm_head.weight"], before["lm_head.weight"], rtol=4.1e-4)
    assert all(row["critic/grad_norm"] > 0 for row in metrics_of(tmp_path / "run"))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("class Mine: pass", r"is not a subclass of jaxrl\.models\.decoder\.Decoder"),
        (
            "from jaxrl.models.decoder import Decoder\nclass Mine(Decoder): pass",
            "has no rows: say in it under which names",
        ),
        ("Min = 1", "has no function Mine"),
    ],
)
def test_module_that_cannot_be_one_is_refused(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    source = open_pretrained(DATA / "hf_torch" / "llama32-tied")
    with pytest.raises(ValueError, match=message):
        config = model_config(Model(), source.hf_config, module=f"{tmp_path}/mine.py:Mine")
        load_base(source, config, abstract_variables(make_mesh(1, 1, 1), config, "score"), new_head=True)


@pytest.mark.parametrize(
    ("name", "path"), [("v_head.summary", None), ("value_head", None), ("my_prefix", None), ("odd.name", "odd.name")]
)
def test_critic_begins_from_the_head_of_another_library(tmp_path, name, path):
    """TRL's, OpenRLHF's (named in config.json), and one that only `critic.head.path` can name."""
    shutil.copytree(DATA / "heads" / "trl-valuehead-llama", tmp_path / "critic")
    tensors = load_file(tmp_path / "critic" / "model.safetensors")
    kernel, bias = tensors.pop("v_head.summary.weight"), tensors.pop("v_head.summary.bias")
    tensors |= {f"{name}.weight": kernel, f"{name}.bias": bias}
    save_file(tensors, tmp_path / "critic" / "model.safetensors", {"format": "pt"})
    hf_config = load_hf_config(tmp_path / "critic") | ({"value_head_prefix": name} if name == "my_prefix" else {})
    (tmp_path / "critic" / "config.json").write_text(json.dumps(hf_config))
    source = open_pretrained(tmp_path / "critic")
    config = model_config(Model(compute_dtype="float32"), source.hf_config, score_bias=True)
    abstract = abstract_variables(make_mesh(1, 1, 1), config, "score")
    params = load_base(source, config, abstract, new_head=True, head_path=path)
    jax.tree.map(np.testing.assert_array_equal, params["score"], {"kernel": kernel.T, "bias": bias})


def test_head_that_is_not_named_is_reported_before_a_critic_starts_from_zero(tmp_path):
    shutil.copytree(DATA / "heads" / "llama-seqcls-reward", tmp_path / "critic")
    tensors = load_file(tmp_path / "critic" / "model.safetensors")
    tensors["verdict.weight"] = tensors.pop("score.weight")
    save_file(tensors, tmp_path / "critic" / "model.safetensors", {"format": "pt"})
    source = open_pretrained(tmp_path / "critic")
    config = model_config(Model(), source.hf_config, score_bias=True)
    with pytest.raises(ValueError, match=r"verdict\.weight of shape \(1, 32\) .* set head\.path to verdict"):
        load_base(source, config, abstract_variables(make_mesh(1, 1, 1), config, "score"), new_head=True)
