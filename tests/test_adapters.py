"""Training that begins from a PEFT adapter, and the adapter that it leaves."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from letters import add_tokenizer, metrics_of, settings

from jaxrl.config import from_dict
from jaxrl.trainer import Trainer
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.peft import open_adapter
from jaxrl.weights.source import Options, open_source

DATA = Path(__file__).parent / "data" / "peft_lora"


@pytest.fixture
def copy(tmp_path):
    """A fixture's adapter beside its base, to which its config leads."""

    def make(name: str) -> Path:
        for folder in ("base-llama", name):
            shutil.copytree(DATA / folder, tmp_path / folder)
        add_tokenizer(tmp_path / "base-llama")
        return tmp_path / name

    return make


def test_run_goes_on_from_an_adapter_and_leaves_one_with_the_same_ranks_and_patterns(copy, tmp_path):
    folder = copy("regex_patterns")
    tree = settings(tmp_path / "run", model={"path": str(folder), "compute_dtype": "float32"})
    tree["actor"] |= {"use_kl_loss": True}
    tree["trainer"]["save_freq"] = 2
    trainer = Trainer(from_dict(tree))
    before = open_adapter(folder)
    trainer.fit()
    out = tmp_path / "run" / "adapter"
    assert (out / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()
    after = open_adapter(out)
    assert after.modules == before.modules
    moved = [name for name in before.checkpoint.tensors
             if not np.array_equal(before.checkpoint.read(name), after.checkpoint.read(name))]  # fmt: skip
    assert len(moved) == len(before.checkpoint.tensors)
    saved = open_source(str(tmp_path / "run" / "checkpoints" / "global_step_2"), Options(merge_lora=True)).checkpoint
    exported = open_checkpoint(tmp_path / "run" / "hf")  # the checkpoint knows the adapter's scales, too
    for name in exported.tensors:
        np.testing.assert_allclose(saved.read(name), exported.read(name), rtol=1e-6, atol=1e-7, err_msg=name)
    first = metrics_of(tmp_path / "run")[0]
    assert first["actor/kl_loss"] > 1e-4  # the reference is the base without the adapter that training began from
    assert first["training/rollout_probs_diff_max"] < 1e-4 and (tmp_path / "run" / "hf" / "tokenizer.json").is_file()


def test_adapter_may_be_named_beside_its_base(copy, tmp_path):
    folder = copy("rslora")
    model = {"path": str(tmp_path / "base-llama"), "lora_adapter_path": str(folder), "compute_dtype": "float32"}
    roles = Trainer(from_dict(settings(tmp_path / "run", model=model))).roles
    adapter = open_adapter(folder)
    module, lora = next(iter(adapter.modules.items()))
    assert roles.model.lora_rank == lora.rank and roles.model.lora_scale == pytest.approx(lora.scale)
    *_, layer, block, name = module.split(".")
    ours = roles.actor.trained["lora"]["layers"][block][name]["a"][int(layer)]
    np.testing.assert_array_equal(np.asarray(ours).reshape(-1, lora.rank).T, adapter.checkpoint.read(lora.a))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora", {"lora_rank": 64}, "model.lora_rank is 64, and the adapter .* has rank 4: leave lora_rank out"),
        ("dora", {}, r"DoRA's magnitudes .*can be merged but not trained here"),
        ("lora", {"lora_adapter_path": "x"}, "is an adapter itself: name its base"),
    ],
)
def test_what_training_cannot_begin_from_is_refused_before_the_run_has_a_folder(copy, tmp_path, name, changes, message):
    model = {"path": str(copy(name)), **changes}
    with pytest.raises(ValueError, match=message):
        Trainer(from_dict(settings(tmp_path / "run", model=model)))
    assert not (tmp_path / "run").exists()


def test_folder_that_is_no_adapter_is_refused(copy, tmp_path):
    copy("lora")
    model = {"path": str(tmp_path / "base-llama"), "lora_adapter_path": str(tmp_path / "base-llama")}
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json: name the folder of a PEFT adapter"):
        Trainer(from_dict(settings(tmp_path / "run", model=model)))
