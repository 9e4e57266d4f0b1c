"""Checkpoints of the real libraries into sharded arrays, and every way in which a checkpoint can be wrong."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params
from jaxrl.parallel import make_mesh, with_shardings
from jaxrl.weights.hf_names import Row, axis_sizes, flatten, rows
from jaxrl.weights.load import load_hf_config, load_params, open_checkpoint, resolve

DATA = Path(__file__).parent / "data" / "hf_torch"
FOLDERS = ["llama31", "llama32-tied", "llama-linear-rope", "qwen2", "qwen3"]


def config_of(folder: Path, **run) -> ModelConfig:
    return ModelConfig.from_hf(load_hf_config(folder), **run)


def wanted(config: ModelConfig, head: str = "lm"):
    return abstract_params(config, head)[0]["params"]


def load(folder: Path, head: str = "lm", **options):
    config = config_of(folder)
    return load_params(folder, config, wanted(config, head), **options)


@pytest.fixture
def copy(tmp_path):
    """A function that copies a fixture and rewrites its tensors."""

    def make(name: str, change=lambda tensors: None, **config_changes) -> Path:
        folder = tmp_path / name
        shutil.copytree(DATA / name, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = load_hf_config(folder) | config_changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def shard(folder: Path, *, parts: int = 3) -> dict[str, str]:
    """Split the safetensors of a folder; returns the weight map of its index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        chosen = {key: tensors[key] for key in sorted(tensors)[part::parts]}
        save_file(chosen, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, name)
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", FOLDERS)
def test_loaded_arrays_are_the_torch_tensors_transposed_and_stacked(name):
    config, tensors = config_of(DATA / name), load_file(DATA / name / "model.safetensors")
    params = load(DATA / name)
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    assert (N * H, N, K) != (D, K, N) or name == "llama31"  # a wrong transpose would change a shape
    for layer in range(config.num_layers):
        attention, prefix = params["layers"]["self_attn"], f"model.layers.{layer}."
        q = tensors[prefix + "self_attn.q_proj.weight"]
        np.testing.assert_array_equal(attention["q_proj"]["kernel"][layer], q.T.reshape(D, N, H))
        o = tensors[prefix + "self_attn.o_proj.weight"]
        np.testing.assert_array_equal(attention["o_proj"]["kernel"][layer], o.T.reshape(N, H, D))
        down = tensors[prefix + "mlp.down_proj.weight"]
        np.testing.assert_array_equal(params["layers"]["mlp"]["down_proj"]["kernel"][layer], down.T)
        if config.qkv_bias:
            bias = tensors[prefix + "self_attn.k_proj.bias"]
            np.testing.assert_array_equal(attention["k_proj"]["bias"][layer], bias.reshape(K, H))
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], tensors["model.embed_tokens.weight"])
    assert ("lm_head" in params) == (not config.tie_embeddings)


@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (1, 1, 8), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("name", ["qwen2", "llama31", "phi3", "gpt-neox", "gpt-oss"])
def test_any_mesh_loads_the_same_arrays_where_they_belong(name, mesh_shape):
    config = config_of(DATA / name)
    abstract, axes = abstract_params(config)
    target = with_shardings(make_mesh(*mesh_shape), abstract["params"], axes["params"])
    sharded, single = dict(flatten(load_params(DATA / name, config, target))), dict(flatten(load(DATA / name)))
    for path, struct in flatten(target):
        assert sharded[path].sharding == struct.sharding, path
        np.testing.assert_array_equal(sharded[path], single[path], err_msg=path)
    assert sharded.keys() == single.keys()


@pytest.mark.parametrize(
    "folder", [*sorted(DATA.iterdir()), DATA.parent / "hf_flax" / "bloom"], ids=lambda path: path.name
)
def test_every_byte_is_read_once_however_many_devices_share_it(folder):
    """8 replicas read the file once; 8 shards together read it once, so none reads more than it holds, of fused matrices
    (Phi-3, GPT-NeoX, Bloom, gpt-oss) too; weights that are not split are read once too."""
    config = config_of(folder)
    for mesh_shape in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        abstract, axes = abstract_params(config)
        checkpoint = open_checkpoint(folder)
        load_params(checkpoint, config, with_shardings(make_mesh(*mesh_shape), abstract["params"], axes["params"]))
        stored = checkpoint.tensors.values()
        assert checkpoint.bytes_read == sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored)


def test_a_host_reads_only_the_slices_of_its_own_devices():
    """One device of eight, as a host of eight would see it: an eighth of the bytes of a weight that is split 8 ways."""
    folder = DATA / "llama31"
    sizes = axis_sizes(config_of(folder))
    for row, index, share in (
        (Row("x", "model.layers.0.self_attn.q_proj.weight", "(n h) d -> d n h"), np.s_[0:4, 0:4, 0:8], 8),  # over D
        (Row("x", "model.layers.0.self_attn.q_proj.weight", "(n h) d -> d n h"), np.s_[0:32, 3:4, 0:8], 4),  # over N
        (Row("x", "model.layers.0.self_attn.o_proj.weight", "d (n h) -> n h d"), np.s_[1:2, 0:8, 8:16], 16),  # both
        (Row("x", "model.embed_tokens.weight", "v d -> v d"), np.s_[70:80, 0:32], 8),
    ):
        checkpoint = open_checkpoint(folder)
        whole = row.to_ours(checkpoint.read(row.hf), tuple(slice(0, sizes[x]) for x in row.letters), sizes)
        checkpoint.bytes_read = 0
        piece = row.to_ours(checkpoint.read(row.hf, row.hf_index(index, sizes)), index, sizes)
        np.testing.assert_array_equal(piece, whole[index])
        assert checkpoint.bytes_read == whole.nbytes // share


def test_a_cut_through_the_inner_of_two_merged_axes_is_right_too():
    row = Row("x", "w", "(n h) d -> d n h")
    sizes, w = {"n": 3, "h": 4, "d": 5}, np.arange(60).reshape(12, 5)
    index = np.s_[1:4, 1:3, 2:4]
    np.testing.assert_array_equal(row.to_ours(w[row.hf_index(index, sizes)], index, sizes), w.T.reshape(5, 3, 4)[index])


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_read_backwards_give_the_torch_tensor(name):
    config, tensors = config_of(DATA / name), load_file(DATA / name / "model.safetensors")
    sizes = axis_sizes(config)
    for row in rows(config):
        for hf in row.hf_names(sizes):
            whole = tuple(slice(0, sizes[letter]) for letter in row.letters)
            np.testing.assert_array_equal(row.to_hf(row.to_ours(tensors[hf], whole, sizes)), tensors[hf])


def test_tensors_are_cast_to_the_wanted_dtype(copy):
    folder = copy("qwen3", lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}))
    params = load(folder)
    assert {array.dtype for _, array in flatten(params)} == {np.dtype("float32")}
    as_bf16 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    again = load_params(DATA / "qwen3", config_of(folder), as_bf16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), params, again)


def test_a_loaded_array_may_be_donated_without_touching_the_file():
    sharding = NamedSharding(make_mesh(1, 1, 1, jax.devices()[:1]), PartitionSpec())
    config = config_of(DATA / "qwen3")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted(config))
    params = load_params(DATA / "qwen3", config, target)
    before = jax.device_get(load_params(DATA / "qwen3", config, target))
    jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(params)
    jax.tree.map(np.testing.assert_array_equal, before, load_params(DATA / "qwen3", config, target))


def test_sharded_checkpoint_equals_the_single_file(copy):
    folder = copy("llama31")
    shard(folder)
    jax.tree.map(np.testing.assert_array_equal, load(folder), load(DATA / "llama31"))


def test_critic_starts_from_a_language_model_and_leaves_its_head_to_the_caller():
    params = load(DATA / "llama31", head="score", allow_missing={"score.kernel"})
    assert params["score"] == {"kernel": None} and "lm_head" not in params
    with pytest.raises(ValueError, match=r"lacks tensor score\.weight that this model needs .*head 'score'"):
        load(DATA / "llama31", head="score")


def test_critic_with_a_bias_loads_both_parts_of_its_head(copy):
    def to_critic(tensors):
        tensors["score.weight"] = np.arange(32, dtype=np.float32)[None]
        tensors["score.bias"] = np.array([0.5], np.float32)

    folder = copy("qwen2", to_critic)
    config = config_of(folder, score_bias=True)
    params = load_params(folder, config, wanted(config, "score"))
    np.testing.assert_array_equal(params["score"]["kernel"][:, 0], np.arange(32))
    assert params["score"]["bias"] == 0.5
    with pytest.raises(ValueError, match=r"holds tensor score\.bias that this model has no place for"):
        load(folder, head="score")


def test_missing_tensors_are_named(copy):
    folder = copy("qwen3", lambda t: [t.pop(f"model.layers.{i}.self_attn.q_norm.weight") for i in (0, 1)])
    with pytest.raises(
        ValueError, match=r"lacks tensors model\.layers\.0\.self_attn\.q_norm\.weight, model\.layers\.1"
    ):
        load(folder)


def test_extra_tensor_is_named(copy):
    folder = copy("llama31", lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(32, np.float32)}))
    with pytest.raises(
        ValueError, match=r"holds tensor model\.layers\.2\.input_layernorm\.weight that this model has no"
    ):
        load(folder)


def test_many_wrong_names_are_counted(copy):
    folder = copy("llama31", lambda t: [t.update({f"visual.{i}": np.ones(1)}) for i in range(9)])
    with pytest.raises(ValueError, match=r"tensors visual\.0, visual\.1, visual\.2 and 6 more"):
        load(folder)


def test_misshapen_tensor_is_named_with_both_shapes(copy):
    def transpose(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ascontiguousarray(
            tensors["model.layers.1.mlp.up_proj.weight"].T
        )

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \(32, 40\), expected \(40, 32\)"):
        load(copy("llama31", transpose))


def test_numbers_that_are_not_finite_are_refused_on_request(copy):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4:6] = np.nan, np.inf

    folder = copy("llama31", poison)
    load(folder)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds 2 NaN or infinite numbers"):
        load(folder, check_finite=True)


def test_stored_inverse_frequencies_of_old_files_are_ignored(copy):
    load(copy("llama31", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})))


def test_tied_model_may_repeat_its_embedding_as_head_but_not_contradict_it(copy):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def contradict(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    assert "lm_head" not in load(copy("qwen2", repeat))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(copy("llama32-tied", contradict))


def test_truncated_file_is_refused(copy):
    folder = copy("llama31")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 8, 300, 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*cut short"):
            load(folder)


def test_index_that_names_a_missing_shard_is_refused(copy):
    folder = copy("llama31")
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"places tensor \S+ in model-00002-of-00003\.safetensors, which does not exist"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/part.safetensors", "..", ""])
def test_index_that_leaves_the_folder_is_refused(copy, name):
    folder = copy("llama31")
    save_file({"secret": np.ones(1)}, folder.parent / "outside.safetensors")
    write_index(folder, shard(folder) | {"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"places tensor model\.norm\.weight in '.*': a shard must be a .* beside"):
        load(folder)


def test_index_that_disagrees_with_its_shards_is_refused(copy):
    folder = copy("llama31")
    weight_map = shard(folder)
    one, other = sorted(set(weight_map.values()))[:2]
    name = next(key for key, file in weight_map.items() if file == one)
    write_index(folder, weight_map | {name: other})
    with pytest.raises(ValueError, match=f"says that tensor {name} is in {other}, and it is not"):
        load(folder)
    write_index(folder, weight_map)
    shutil.copy(folder / one, folder / "again.safetensors")
    write_index(folder, weight_map | {"model.unheard_of": "again.safetensors"})
    with pytest.raises(ValueError, match=r"stands in \S+ and again in"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight')
    with pytest.raises(ValueError, match="is not an index of weights"):
        load(folder)


def test_resolve_names_what_was_tried(tmp_path, monkeypatch):
    assert resolve(DATA / "qwen3") == DATA / "qwen3"
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        resolve(tmp_path)
    with pytest.raises(ValueError, match=r"/no/such/model does not exist, and '/no/such/model' is not an id"):
        resolve("/no/such/model")
    with pytest.raises(ValueError, match=r"missing\.gguf does not exist"):
        resolve("missing.gguf")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_hf_config(tmp_path)


def test_unreachable_hub_is_said_in_one_sentence(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"model 'no-such-owner/no-such-model' is not a local folder, and fetching it from"
    ):
        resolve("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    "weights, fetched",
    [
        (["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], ["model.safetensors"]),
        (["pytorch_model-00001-of-00002.bin", "tf_model.h5"], ["pytorch_model-00001-of-00002.bin"]),
        (["flax_model.msgpack", "onnx/model.safetensors"], ["flax_model.msgpack"]),
        (["model[1].safetensors", "consolidated.safetensors"], ["model[1].safetensors"]),
    ],
)
def test_of_the_hub_one_kind_of_weights_is_fetched_and_only_what_lies_at_the_root(
    monkeypatch, tmp_path, weights, fetched
):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    beside = ["config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"]
    others = [
        "README.md",
        "original/params.json",
        "fp16/model.safetensors",
        "checkpoint-5/optimizer.json",
        "figures/a.png",
    ]
    got = []

    def snapshot_download(model_id, **options):
        got.extend(filter_repo_objects([*beside, *weights, *others], **options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, model_id: [*beside, *weights, *others])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text("{}")
    assert resolve("owner/model") == tmp_path
    assert sorted(got) == sorted([*beside, *fetched])


def test_adapter_as_a_model_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter and not a model: merge it first, .*--merge-lora"):
        resolve(tmp_path)
