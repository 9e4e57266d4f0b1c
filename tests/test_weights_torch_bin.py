"""`pytorch_model.bin` read without torch: torch's own tensors back, lazily; hostile and damaged files are refused."""

import importlib.abc
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.load import load_hf_config, load_params
from jaxrl.weights.torch_bin import open_torch_bin

DATA = Path(__file__).parent / "data" / "hf_torch"


@pytest.fixture
def torch_disappears(monkeypatch):
    """A function after which `import torch` fails."""

    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "torch" or name.startswith("torch."):
                raise ModuleNotFoundError("No module named 'torch'", name="torch")

    def disappear() -> None:
        for name in [name for name in sys.modules if name == "torch" or name.startswith("torch.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])

    return disappear


def save(path: Path, state: object) -> None:
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)


def as_torch(folder: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()}


def numbers(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_and_layout_that_torch_saves_comes_back_bit_for_bit(tmp_path, torch_disappears):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
    state = {str(kind): (torch.arange(12).reshape(3, 4) % 3).to(kind) for kind in kinds}
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    state |= {
        "transposed": base.T, "part": base[1:4, 2:], "every other": base[::2], "shares": base, "row": base[3],
        "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "expanded": base[:1].expand(3, 5),
        "parameter": torch.nn.Parameter(base + 1),
    }  # fmt: skip
    save(tmp_path / "model.bin", state)
    expected = {name: (tuple(tensor.shape), numbers(tensor)) for name, tensor in state.items()}
    torch_disappears()
    tensors = open_torch_bin(tmp_path / "model.bin")
    assert tensors.keys() == state.keys()
    for name in state:
        read = tensors[name].read(tensors[name].whole)
        assert (read.shape, read.tobytes()) == expected[name] and read.dtype == tensors[name].dtype, name


def test_state_dict_of_a_module_with_its_metadata_is_read(tmp_path, torch_disappears):
    module = torch.nn.Linear(3, 2)
    save(tmp_path / "model.bin", module.state_dict())
    expected = module.weight.detach().numpy()
    torch_disappears()
    tensors = open_torch_bin(tmp_path / "model.bin")
    np.testing.assert_array_equal(tensors["weight"].read(tensors["weight"].whole), expected)


def test_bin_folder_loads_the_same_arrays_as_its_safetensors(tmp_path, torch_disappears):
    source = DATA / "qwen3"
    state = as_torch(source)
    save(tmp_path / "one" / "pytorch_model.bin", state)
    names, parts = list(state), {}
    for part in range(3):
        name = f"pytorch_model-{part + 1:05d}-of-00003.bin"
        save(tmp_path / "many" / name, OrderedDict((key, state[key]) for key in names[part::3]))
        parts |= dict.fromkeys(names[part::3], name)
    index = {"metadata": {"total_size": 0}, "weight_map": parts}
    (tmp_path / "many" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch_disappears()
    config = ModelConfig.from_hf(load_hf_config(source))
    target = abstract_params(config)[0]["params"]
    expected = load_params(source, config, target)
    for folder in ("one", "many"):
        checkpoint = open_checkpoint(tmp_path / folder)
        assert checkpoint.kind == "torch"
        jax.tree.map(np.testing.assert_array_equal, load_params(checkpoint, config, target), expected)


def test_only_the_slice_that_is_asked_for_is_touched(tmp_path):
    """A tensor of 1 GB that is a hole in a sparse file: reading all of it would show in the memory of the process."""
    rows = 2**18
    save(tmp_path / "pytorch_model.bin", {"w": torch.zeros(rows, 1024)})
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("w", np.s_[5:7, 3:5]).shape == (2, 2)
    assert checkpoint.bytes_read == 16
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


class _Attack:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    "attack, name",
    [
        (_Attack(os.system, "touch hacked"), "system"),
        (_Attack(eval, "open('hacked', 'w')"), "eval"),
        (_Attack(getattr, "abc", "upper"), "getattr"),
        (_Attack(os.mkdir, "hacked"), "mkdir"),
    ],
)
@pytest.mark.parametrize("place", ["value", "key", "whole"])
def test_pickle_that_asks_for_anything_but_tensors_is_refused_by_name_and_runs_nothing(
    tmp_path, monkeypatch, attack, name, place
):
    monkeypatch.chdir(tmp_path)
    state = {"value": {"w": torch.ones(2), "x": attack}, "key": {(attack,): 1}, "whole": attack}[place]
    save(tmp_path / "pytorch_model.bin", state)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin asks for (__builtin__|builtins|posix)\.{name},"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_tools_of_the_reader_cannot_be_turned_against_it(tmp_path):
    """A pickle may set attributes of whatever it is given (BUILD): the callables that it is given have none."""
    program = b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x08\x00\x00\x00__call__K\x01s\x86b."
    write_archive(tmp_path / "pytorch_model.bin", {"archive/data.pkl": program})
    with pytest.raises(ValueError, match="cannot be read .*AttributeError"):
        open_checkpoint(tmp_path)


def write_archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def archive_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    save(tmp_path / "m.bin", {"w": torch.ones(4, 4)})
    entries = archive_of(tmp_path / "m.bin")
    entries["m/data/0"] = entries["m/data/0"][:-4]
    write_archive(tmp_path / "pytorch_model.bin", entries)
    with pytest.raises(ValueError, match="tensor w does not lie inside its storage"):
        open_checkpoint(tmp_path)
    del entries["m/data/0"]
    write_archive(tmp_path / "pytorch_model.bin", entries)
    with pytest.raises(ValueError, match="tensor w does not lie inside its storage"):
        open_checkpoint(tmp_path)


def test_truncated_file_is_refused(tmp_path):
    save(tmp_path / "pytorch_model.bin", as_torch(DATA / "qwen3"))
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    for size in (len(whole) - 10, len(whole) // 2, 100, 2, 0):
        (tmp_path / "pytorch_model.bin").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read .*cut short"):
            open_checkpoint(tmp_path)


def test_archives_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    write_archive(path, {"word/document.xml": b"<xml/>"})
    with pytest.raises(ValueError, match="not one that torch.save wrote"):
        open_checkpoint(tmp_path)
    save(path, {"w": torch.ones(3)})
    entries = archive_of(path)
    write_archive(path, entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        open_checkpoint(tmp_path)
    write_archive(path, entries | {"pytorch_model/byteorder": b"big"})
    with pytest.raises(ValueError, match="big-endian"):
        open_checkpoint(tmp_path)
    write_archive(path, entries | {"pytorch_model/data.pkl": b"\x80\x02garbage"})
    with pytest.raises(ValueError, match="cannot be read"):
        open_checkpoint(tmp_path)


def test_what_is_no_tensor_is_named(tmp_path):
    save(tmp_path / "pytorch_model.bin", {"model": {"w": torch.ones(2)}})
    with pytest.raises(ValueError, match="holds 'model', which is not a tensor but of type dict"):
        open_checkpoint(tmp_path)
    save(tmp_path / "pytorch_model.bin", [torch.ones(2)])
    with pytest.raises(ValueError, match="holds a list where a state dict"):
        open_checkpoint(tmp_path)


def test_form_from_before_torch_1_6_needs_torch_and_says_so(tmp_path, torch_disappears):
    state = {"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.ones(2)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path)
    expected = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(checkpoint.read("w"), expected)
    torch_disappears()
    with pytest.raises(ValueError, match=r"from before version 1\.6, which only PyTorch reads: pip install torch"):
        open_checkpoint(tmp_path)


def test_hostile_file_of_the_old_form_is_refused_too(tmp_path):
    torch.save({"x": _Attack(os.system, "true")}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="holds more than tensors"):
        open_checkpoint(tmp_path)


def test_bare_pickle_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="is a bare pickle"):
        open_checkpoint(tmp_path)
