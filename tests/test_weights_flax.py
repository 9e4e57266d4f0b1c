"""Hugging Face's Flax checkpoints: for every family the tensors of HF's own conversion to torch, found by content."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params
from jaxrl.parallel import make_mesh, with_shardings
from jaxrl.weights.flax_msgpack import open_msgpack
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.load import load_hf_config, load_params

DATA = Path(__file__).parent / "data" / "hf_flax"
FAMILIES = ["llama", "mistral", "gemma", "gpt2", "opt", "opt-350m-style", "gptj", "gpt_neo", "bloom"]


@pytest.fixture
def copy(tmp_path):
    def make(name: str) -> Path:
        shutil.copytree(DATA / name, tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_flax_file_of_each_family_holds_the_tensors_of_its_torch_conversion(family):
    ours, theirs = open_checkpoint(DATA / family), open_checkpoint(DATA / family / "torch")
    assert (ours.kind, ours.layout) == ("msgpack", "flax") and (theirs.kind, theirs.layout) == ("safetensors", "torch")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        read = ours.read(name)
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype) == (theirs.read(name).shape, np.float32)
        np.testing.assert_array_equal(read, theirs.read(name), err_msg=name)
        cut = tuple(slice(size // 3, size - 1) for size in tensor.shape)
        np.testing.assert_array_equal(ours.read(name, cut), theirs.read(name, cut), err_msg=name)


@pytest.mark.parametrize("folder", ["llama-sharded", "llama-flax-safetensors"])
def test_flax_model_in_shards_or_as_safetensors_is_the_same_model(folder):
    ours, theirs = open_checkpoint(DATA / folder), open_checkpoint(DATA / "llama")
    assert ours.layout == "flax" and ours.tensors.keys() == theirs.tensors.keys()
    for name in ours.tensors:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name), err_msg=name)


def test_bfloat16_file_keeps_its_dtype():
    ours, whole = open_checkpoint(DATA / "llama-bf16"), open_checkpoint(DATA / "llama")
    for name in whole.tensors:
        assert ours.tensors[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(ours.read(name), whole.read(name).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("folder", ["llama", "llama-sharded", "llama-flax-safetensors"])
def test_flax_llama_loads_onto_any_mesh_as_its_torch_twin_does(folder):
    config = ModelConfig.from_hf(load_hf_config(DATA / folder))
    abstract, axes = abstract_params(config)
    expected = load_params(DATA / "llama" / "torch", config, abstract["params"])
    for mesh in ((2, 2, 2), (1, 8, 1)):
        target = with_shardings(make_mesh(*mesh), abstract["params"], axes["params"])
        jax.tree.map(np.testing.assert_array_equal, load_params(DATA / folder, config, target), expected)


def test_shards_may_be_flat(copy):
    folder = copy("llama-sharded")
    for path in folder.glob("*-of-*.msgpack"):
        flat = {name: np.array(tensor.read(tensor.whole)) for name, tensor in open_msgpack(path).items()}
        path.write_bytes(serialization.msgpack_serialize(flat))
    ours, theirs = open_checkpoint(folder), open_checkpoint(DATA / "llama")
    assert ours.tensors.keys() == theirs.tensors.keys()
    np.testing.assert_array_equal(ours.read("lm_head.weight"), theirs.read("lm_head.weight"))


def test_arrays_that_flax_cut_into_chunks_are_read_by_slice(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": rng.normal(size=(7, 5)).astype(np.float32)}, "b": {"embedding": rng.normal(size=(9, 2, 3))}}
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 40)
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    assert b"__msgpack_chunked_array__" in (tmp_path / "flax_model.msgpack").read_bytes()
    checkpoint = open_checkpoint(tmp_path)
    kernel, table = tree["a"]["kernel"].T, tree["b"]["embedding"]
    for name, whole in (("a.weight", kernel), ("b.weight", table)):
        for index in ((slice(0, 99),), (slice(0, 0),), (slice(1, 2),), (slice(2, 5),)):
            index = (*index, slice(1, 2), slice(1, 3))[: whole.ndim]
            np.testing.assert_array_equal(checkpoint.read(name, index), whole[index])
        np.testing.assert_array_equal(checkpoint.read(name), whole)


def test_every_array_type_that_flax_writes_is_read(tmp_path):
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_]
    tree = {np.dtype(dtype).name: {"bias": np.arange(300).astype(dtype)} for dtype in dtypes}
    tree |= {
        "scalar": {"scale": np.float32(2.5)},
        "single": {"scale": np.array(7.0)},
        "wide": {"bias": np.zeros(70_000)},
    }
    tree |= {f"m{i}": {"bias": np.full(i, i)} for i in range(20)}  # more keys than a short map has
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes({"params": tree}))
    tensors = open_msgpack(tmp_path / "flax_model.msgpack")
    for name, leaves in tree.items():
        for leaf, array in leaves.items():
            read = tensors[f"{name}/{leaf}"].read(tensors[f"{name}/{leaf}"].whole)
            assert read.dtype == array.dtype and read.shape == array.shape
            np.testing.assert_array_equal(read, array)


def test_layout_is_told_by_names_and_not_by_the_name_of_the_file(copy):
    folder = copy("llama-flax-safetensors")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")  # without the metadata
    assert open_checkpoint(folder).layout == "flax"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # safetensors under another name
    assert (open_checkpoint(folder).layout, open_checkpoint(folder).kind) == ("flax", "safetensors")
    shutil.move(folder / "pytorch_model.bin", folder / "weights.bin")
    assert open_checkpoint(folder / "weights.bin").layout == "flax"


@pytest.mark.parametrize("claim, source", [("flax", "torch"), ("tf", "torch"), ("pt", "flax")])
def test_metadata_that_contradicts_the_names_is_refused(tmp_path, claim, source):
    folder = DATA / "llama" / "torch" if source == "torch" else DATA / "llama-flax-safetensors"
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": claim})
    with pytest.raises(ValueError, match=rf"in {claim!r} layout, and its names are those of {source}"):
        open_checkpoint(tmp_path)


def test_truncated_msgpack_is_refused(copy):
    path = copy("llama") / "flax_model.msgpack"
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20, 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"flax_model\.msgpack cannot be read .*cut short"):
            open_checkpoint(path.parent)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="goes on after its end"):
        open_checkpoint(path.parent)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": {"kernel": 1}}, "a/kernel is no array but '1'"),
        ({"a": {"kernel": None}}, "a/kernel is no array but 'None'"),
        ({"a": [1, 2]}, "is no array"),
        ({"a": 1.5}, "msgpack type 0xcb"),
        ({"a": msgpack.ExtType(2, b"x")}, "extension type 2"),
        ({"a": msgpack.ExtType(1, msgpack.packb(((2, 2), "float32", b"1234")))}, "does not fit its bytes"),
        ({"a": msgpack.ExtType(1, msgpack.packb(((-1,), "float32", b"")))}, "does not fit its bytes"),
        ({"a": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678")))}, "dtype 'object'"),
        ({"a": msgpack.ExtType(1, msgpack.packb([1, 2]))}, "is not .shape, dtype, bytes"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {}}}, "in parts"),
    ],
)
def test_what_is_no_array_of_a_model_is_refused(tmp_path, content, message):
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(content))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_bottomless_nesting_and_repeated_names_are_refused(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(b"\x81\xa1a" * 5000 + b"\xc0")
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        open_checkpoint(tmp_path)
    path.write_bytes(b"\x82\xa1a\x01\xa1a\x01")
    with pytest.raises(ValueError, match="has the key 'a' where a new name is expected"):
        open_checkpoint(tmp_path)


def test_index_of_shards_is_checked(copy):
    folder = copy("llama-sharded")
    index = json.loads((folder / "flax_model.msgpack.index.json").read_text())
    for name, message in (("../x.msgpack", "must be a file beside"), ("gone.msgpack", "does not exist")):
        changed = index | {"weight_map": index["weight_map"] | {"model/norm/weight": name}}
        (folder / "flax_model.msgpack.index.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            open_checkpoint(folder)
