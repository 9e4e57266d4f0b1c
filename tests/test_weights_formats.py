"""What lies in a folder: found, told apart by content, and refused where two models in it disagree."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jaxrl.weights.formats import kind_of, open_checkpoint

DATA = Path(__file__).parent / "data"


@pytest.fixture
def llama(tmp_path) -> Path:
    """The Flax llama as three files of one folder: msgpack, safetensors and .bin of the same weights."""
    folder = tmp_path / "llama"
    shutil.copytree(DATA / "hf_flax" / "llama", folder, ignore=shutil.ignore_patterns("torch"))
    shutil.copy(DATA / "hf_flax" / "llama" / "torch" / "model.safetensors", folder)
    state = {name: torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_one_model_in_three_formats_is_read_from_safetensors(llama):
    assert [kind_of(llama / name) for name in ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")] == [
        "safetensors", "torch", "msgpack"
    ]  # fmt: skip
    assert open_checkpoint(llama).kind == "safetensors"
    (llama / "model.safetensors").unlink()
    assert open_checkpoint(llama).kind == "torch"
    (llama / "pytorch_model.bin").unlink()
    assert open_checkpoint(llama).kind == "msgpack"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_same_model_in_two_precisions_agrees(llama, dtype):
    rewrite(llama / "model.safetensors", lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
    assert open_checkpoint(llama).tensors["model.norm.weight"].dtype == dtype


def test_two_models_in_one_folder_that_disagree_are_refused_and_the_tensor_is_named(llama):
    def last_number(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 0.5

    rewrite(llama / "model.safetensors", last_number)
    with pytest.raises(
        ValueError,
        match=r"model\.safetensors and pytorch_model\.bin, which differ: tensor model\.layers\.1\.mlp\.up_proj\.weight",
    ):
        open_checkpoint(llama)
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors and flax_model\.msgpack, which differ"):
        open_checkpoint(llama)
    rewrite(llama / "model.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is only in flax_model\.msgpack"):
        open_checkpoint(llama)
    rewrite(llama / "model.safetensors", lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight has shape \(31,\) in model\.safetensors and"):
        open_checkpoint(llama)


@pytest.mark.parametrize("with_prefix", ["model.safetensors", "pytorch_model.bin"])
def test_masks_and_prefixes_that_loading_ignores_do_not_make_two_models(tmp_path, with_prefix):
    plain = load_file(DATA / "peft_lora" / "base-gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in plain.items()}
    masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 32, 32), np.float32) for layer in range(2)}
    masks |= {
        "h.0.attn.masked_bias": np.array(-1e4, np.float32),
        "h.0.attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    files = [plain | {"lm_head.weight": plain["transformer.wte.weight"]}, bare | masks]
    first, second = files if with_prefix == "model.safetensors" else files[::-1]
    save_file(first, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def save_second():
        torch.save({name: torch.from_numpy(x) for name, x in second.items()}, tmp_path / "pytorch_model.bin")

    save_second()
    assert open_checkpoint(tmp_path).tensors.keys() == first.keys()
    name = next(name for name in second if name.endswith("h.1.mlp.c_fc.weight"))
    second[name] = second[name] + 1
    save_second()
    with pytest.raises(ValueError, match=r"which differ: tensor .*h\.1\.mlp\.c_fc\.weight has other numbers"):
        open_checkpoint(tmp_path)


def test_a_bin_from_before_torch_1_6_is_left_aside_where_there_is_another_format(llama, caplog):
    torch.save({"w": torch.ones(2)}, llama / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with caplog.at_level("INFO", "jaxrl"):
        assert open_checkpoint(llama).kind == "safetensors"
    assert "pytorch_model.bin is in PyTorch's format from before version 1.6, and is left aside" in caplog.text


def test_index_that_was_fetched_without_its_files_is_no_second_model(llama):
    (llama / "pytorch_model.bin").unlink()
    (llama / "flax_model.msgpack").unlink()
    index = '{"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00002.bin"}}'
    (llama / "pytorch_model.bin.index.json").write_text(index)
    assert open_checkpoint(llama).kind == "safetensors"
    (llama / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight in pytorch_model-00001-of-00002\.bin, which does not exist"
    ):
        open_checkpoint(llama)


def test_one_file_may_be_named_itself_whatever_its_name(llama, tmp_path):
    shutil.copy(llama / "flax_model.msgpack", tmp_path / "any.thing")
    assert open_checkpoint(tmp_path / "any.thing").kind == "msgpack"
    shutil.copy(llama / "model.safetensors", llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    (llama / "flax_model.msgpack").unlink()
    assert open_checkpoint(llama).kind == "safetensors"


def test_only_file_under_an_unusual_name_is_taken_and_two_are_not(llama):
    for name in ("pytorch_model.bin", "flax_model.msgpack"):
        (llama / name).unlink()
    (llama / "model.safetensors").rename(llama / "ema.safetensors")
    torch.save({}, llama / "training_args.bin")
    assert open_checkpoint(llama).tensors
    shutil.copy(llama / "ema.safetensors", llama / "other.safetensors")
    with pytest.raises(ValueError, match=r"but ema\.safetensors, other\.safetensors: name the one file"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "a pointer of Git LFS .*git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "TensorFlow's format"),
        (b"<!DOCTYPE html><html>", "a page of a web site"),
        (b"GGUF\3\0\0\0", "is a GGUF file: name it alone"),
        (b"", "cannot be read .*cut short"),
        (b"\0" * 100, "cannot be read .*begins like no kind of weights"),
    ],
)
def test_what_is_no_model_is_named_for_what_it_is(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("consolidated.safetensors", "Mistral's and Meta's own format, with other names and another rotary layout"),
        ("consolidated.00.pth", "Mistral's and Meta's own format"),
        ("tf_model.h5", "TensorFlow's format"),
        ("model.onnx", "ONNX"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"holds {name}, {message}"):
        open_checkpoint(tmp_path)


def test_folder_without_weights_says_what_is_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor .*flax_model\.msgpack"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"nothing is neither a folder nor a file"):
        open_checkpoint(tmp_path / "nothing")
