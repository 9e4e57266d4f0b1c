"""Models in memory: a torch model in, a torch model back, and a run from Python with live objects."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import ROWS, metrics_of, settings, share_of_a, tokenizer_of
from safetensors.numpy import load_file, save_file

import jaxrl
from jaxrl.models.decoder import head_table, hidden_states, score
from jaxrl.weights.convert import convert
from jaxrl.weights.hf_names import flatten
from jaxrl.weights.source import Options

DATA = Path(__file__).parent / "data"
LLAMA = DATA / "hf_torch" / "llama32-tied"

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def logits_of(model: jaxrl.LoadedModel, tokens):
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    head = "score" if "score" in model.params else "lm"
    with jax.default_matmul_precision("highest"):
        x = hidden_states(model.config, model.variables, tokens, positions, jnp.ones_like(tokens), 0 * tokens, head)
        return score(model.config, model.params, x) if head == "score" else x @ head_table(model.config, model.params).T


def test_importing_jaxrl_starts_nothing_and_loading_a_folder_needs_no_torch():
    code = (
        "import sys, jaxrl\n"
        "assert not {'jax', 'flax', 'torch', 'numpy'} & set(sys.modules)\n"
        f"model = jaxrl.from_hf({str(LLAMA)!r})\n"
        "assert model.config.num_layers == 2 and 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with pytest.raises(AttributeError, match="no attribute 'from_h'"):
        jaxrl.from_h  # noqa: B018


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_live_model_in_and_back_is_the_same_model(dtype):
    live = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=getattr(torch, dtype))
    loaded = jaxrl.from_hf(live)
    by_path = jaxrl.from_hf(str(LLAMA), dtype=dtype)
    assert loaded.config == by_path.config
    for (path, ours), (_, theirs) in zip(flatten(loaded.params), flatten(by_path.params), strict=True):
        assert ours.dtype == dtype, path
        np.testing.assert_array_equal(ours, theirs, err_msg=path)
    back = jaxrl.to_hf(loaded.params, loaded.config)
    assert type(back) is type(live) and back.config.rope_parameters == live.config.rope_parameters
    assert back.dtype == live.dtype and back.lm_head.weight is back.model.embed_tokens.weight
    theirs = live.state_dict()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_live_model_has_the_logits_of_torch():
    live = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    tokens = np.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = live(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(jaxrl.from_hf(live), tokens), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_live_mixture_of_experts_is_read_and_given_back(name):
    """In memory transformers keeps the experts of a layer in one tensor, whatever a checkpoint does."""
    live = transformers.AutoModelForCausalLM.from_pretrained(DATA / "hf_torch" / name, dtype=torch.float32)
    loaded, expected = jaxrl.from_hf(live), np.load(DATA / "hf_torch" / name / "expected_logits.npz")
    np.testing.assert_allclose(logits_of(loaded, expected["input_ids"]), expected["logits"], atol=2e-4)
    ours, theirs = jaxrl.to_hf(loaded.params, loaded.config).state_dict(), live.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_folder_that_to_hf_writes_holds_the_same_tensors(tmp_path):
    model = jaxrl.from_hf(LLAMA)
    assert jaxrl.to_hf(model.params, model.config, tmp_path / "out") is None
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", LLAMA))
    assert ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    with pytest.raises(ValueError, match="exists already"):
        jaxrl.to_hf(model.params, model.config, tmp_path / "out")


@pytest.fixture(scope="module")
def peft_model():
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(DATA / "peft_lora" / "base-llama")
    return peft.PeftModel.from_pretrained(base, DATA / "peft_lora" / "regex_patterns").eval()


def test_live_peft_model_comes_with_its_adapters_and_goes_back_merged(peft_model):
    loaded = jaxrl.from_hf(peft_model)
    by_path = jaxrl.from_hf(DATA / "peft_lora" / "base-llama", adapter=DATA / "peft_lora" / "regex_patterns")
    assert loaded.config == by_path.config and loaded.lora is not None
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, by_path.variables)
    expected = np.load(DATA / "peft_lora" / "regex_patterns" / "expected_logits.npz")
    tokens = expected["input_ids"]
    np.testing.assert_allclose(logits_of(loaded, tokens), expected["logits_adapter"], atol=2e-5)
    back = jaxrl.to_hf(loaded.params, loaded.config, lora=loaded.lora)
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.from_numpy(tokens)).logits, expected["logits_merged"], atol=2e-5)


def test_live_reward_model_keeps_its_head():
    live = transformers.AutoModelForSequenceClassification.from_pretrained(
        DATA / "heads" / "llama-seqcls-reward"
    ).eval()
    loaded = jaxrl.from_hf(live)
    tokens = np.arange(1, 8).reshape(1, 7)
    with torch.no_grad():
        expected = live(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(loaded, tokens)[:, -1], expected, atol=2e-5)
    back = jaxrl.to_hf(loaded.params, loaded.config)
    assert type(back) is type(live) and torch.equal(back.score.weight, live.score.weight)


@pytest.fixture(
    params=[
        ("base-llama", "SEQ_CLS"),
        ("base-llama", "TOKEN_CLS"),
        ("base-gpt2", "SEQ_CLS"),
        ("base-gpt2", "TOKEN_CLS"),
    ]
)
def peft_classifier(request):
    """A classifier on a language model with LoRA, as PEFT makes it, with nothing at zero; and its logits at 2 x 7 tokens."""
    peft = pytest.importorskip("peft")
    base, task = request.param
    kind = {"SEQ_CLS": "Sequence", "TOKEN_CLS": "Token"}[task]
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        auto.from_pretrained(DATA / "peft_lora" / base, num_labels=1),
        peft.LoraConfig(task_type=task, r=4, target_modules=["c_attn"] if base == "base-gpt2" else ["q_proj", "v_proj"]),
    )  # fmt: skip
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
        model.eval()
        return model, model(torch.arange(1, 15).reshape(2, 7)).logits.numpy()


def test_peft_classifier_is_read_live_from_its_folder_and_merged(tmp_path, peft_classifier):
    model, expected = peft_classifier
    model.save_pretrained(tmp_path / "adapter")
    task = model.active_peft_config.task_type
    merged_folder = tmp_path / "merged"
    convert(str(tmp_path / "adapter"), merged_folder, options=Options(merge_lora=True), verify=True)
    sources = [merged_folder]
    if (
        "gpt2" not in model.peft_config["default"].base_model_name_or_path
    ):  # whose c_attn has one A for three of our matrices
        sources += [model, tmp_path / "adapter"]
    for source in sources:
        loaded = jaxrl.from_hf(source)
        assert (loaded.lora is None) == (source is merged_folder)
        logits = logits_of(loaded, np.arange(1, 15).reshape(2, 7))
        logits = logits[:, -1] if task == "SEQ_CLS" else logits
        np.testing.assert_allclose(logits, expected, atol=2e-5)  # float32, another order of sums
    architecture = json.loads((merged_folder / "config.json").read_text())["architectures"][0]
    theirs, report = getattr(transformers, architecture).from_pretrained(merged_folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = theirs(torch.arange(1, 15).reshape(2, 7)).logits
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.fixture(scope="module")
def seeing_model():
    """A tiny Gemma 3 with a vision tower; sizes that its published files leave out are those of its class."""
    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "sliding_window": 4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape) * 0.2)
        tokens = torch.arange(5, 19).reshape(2, 7)
        return model, {"model_type": "gemma3_text", **text}, tokens.numpy(), model(tokens).logits.numpy()


@pytest.mark.parametrize("form", ["hub", "transformers 5", "live"])
def test_a_gemma_that_sees_is_read_as_its_language_model(tmp_path, caplog, seeing_model, form):
    model, text, tokens, expected = seeing_model
    source = model
    if form != "live":
        source = tmp_path / "source"
        model.save_pretrained(source)
        settings = json.loads((source / "config.json").read_text()) | {"text_config": text, "eos_token_id": [1, 106]}
        (source / "config.json").write_text(json.dumps(settings))
    if form == "transformers 5":  # its names in memory
        tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("INFO", "jaxrl"):
        loaded = jaxrl.from_hf(source)
    count = sum("vision_tower" in name or "projector" in name for name in model.state_dict())
    said = [record.message for record in caplog.records if "tensors of vision are left out" in record.message]
    assert len(said) == 1 and f" {count} tensors" in said[0] and "the language model alone" in said[0]
    assert loaded.config.family == "gemma3_text" and loaded.config.vocab_size == 262_208
    np.testing.assert_allclose(logits_of(loaded, tokens), expected, atol=1e-4 * np.abs(expected).max())  # float32

    jaxrl.to_hf(loaded.params, loaded.config, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Gemma3ForCausalLM"] and "vision_config" not in written
    assert written["num_attention_heads"] == 8 and (form == "live" or written["eos_token_id"] == [1, 106])
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        np.testing.assert_allclose(
            theirs(torch.from_numpy(tokens)).logits, expected, atol=1e-4 * np.abs(expected).max()
        )


def test_a_gemma_that_sees_is_converted_to_its_language_model(tmp_path, seeing_model):
    seeing_model[0].save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out", verify=True)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and not any("vision" in name for name in names)


@pytest.mark.parametrize(
    "name, activation",
    [
        ("qwen3-moe", "gelu"), ("qwen3-moe", "gelu_pytorch_tanh"), ("qwen3-moe", "relu"), ("mixtral", "gelu"),
        ("gpt-neox", "gelu_fast"), ("gpt-neox", "relu"),
    ],
)  # fmt: skip
def test_mlp_and_experts_have_the_activation_of_the_config(name, activation):
    live = transformers.AutoModelForCausalLM.from_pretrained(DATA / "hf_torch" / name, hidden_act=activation).eval()
    tokens = np.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = live(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(jaxrl.from_hf(live), tokens), expected, atol=2e-5)  # float32


def test_which_head_is_meant_can_be_said(tmp_path):
    folder = DATA / "heads" / "trl-valuehead-llama"
    with pytest.raises(ValueError, match=r"say which is meant by head \(--head\), lm or score"):
        jaxrl.from_hf(folder)
    assert "lm_head" in jaxrl.from_hf(folder, head="lm").params
    assert jaxrl.from_hf(folder, head="score").params["score"]["bias"].shape == (1,)
    with pytest.raises(ValueError, match="head 'value' is not one of lm, score"):
        jaxrl.from_hf(folder, head="value")
    shutil.copytree(DATA / "heads" / "llama-seqcls-reward", tmp_path / "named")
    tensors = load_file(tmp_path / "named" / "model.safetensors")
    tensors["verdict.proj.weight"] = tensors.pop("score.weight")
    save_file(tensors, tmp_path / "named" / "model.safetensors", metadata={"format": "pt"})
    kernel = jaxrl.from_hf(tmp_path / "named", head_path="verdict.proj").params["score"]["kernel"]
    np.testing.assert_array_equal(kernel.T, tensors["verdict.proj.weight"])


def test_live_model_with_a_head_under_the_name_that_its_config_says_is_read():
    class RewardModel(transformers.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = transformers.LlamaModel(config)
            self.opinion = torch.nn.Linear(config.hidden_size, 1, bias=False)
            self.post_init()

    config = transformers.LlamaConfig.from_pretrained(DATA / "peft_lora" / "base-llama")
    config.value_head_prefix = "opinion"
    live = RewardModel(config)
    kernel = jaxrl.from_hf(live).params["score"]["kernel"]
    np.testing.assert_array_equal(kernel.T, live.opinion.weight.detach())


def test_flax_model_that_ties_its_embeddings_and_holds_another_head_is_loaded_with_it(tmp_path, caplog):
    shutil.copytree(DATA / "hf_flax" / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("torch"))
    config = json.loads((tmp_path / "llama" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    loaded, plain = jaxrl.from_hf(tmp_path / "llama"), jaxrl.from_hf(DATA / "hf_flax" / "llama")
    assert not loaded.config.tie_embeddings and "tie_word_embeddings is set to false" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plain.params)


def test_four_bit_folder_comes_packed():
    model = jaxrl.from_hf(DATA / "bnb_nf4" / "llama-nf4-double")
    assert model.packed is not None and "mlp" not in model.params["layers"]
    expected = np.load(DATA / "bnb_nf4" / "llama-nf4-double" / "expected_logits.npz")
    np.testing.assert_allclose(
        logits_of(model, expected["input_ids"]), expected["logits_dequant_f32"], atol=2e-4
    )  # float32, another order of sums


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="a model is a path, a Hub id or a torch model, not a dict"):
        jaxrl.from_hf({})
    with pytest.raises(ValueError, match="Linear is not a model of transformers"):
        jaxrl.from_hf(torch.nn.Linear(2, 2))


def test_run_from_python_takes_live_model_tokenizer_datasets_and_reward(tmp_path):
    import datasets

    live = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    tokenizer = tokenizer_of(live.config.vocab_size)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    tree = settings(tmp_path / "run")
    del tree["data"]["train_files"], tree["reward"]
    rows, seen = datasets.Dataset.from_list(ROWS), []

    def reward(solution_str, extra_info):  # a closure: no file could name it
        seen.append(extra_info)
        return share_of_a(solution_str)

    config = jaxrl.from_dict(tree)
    with pytest.raises(ValueError, match="the live LlamaForCausalLM brings no tokenizer"):
        jaxrl.Trainer(config, model=live, train_dataset=rows, reward=reward)
    trainer = jaxrl.Trainer(
        config, model=live, tokenizer=tokenizer, train_dataset=rows, val_dataset=ROWS[:2], reward=reward
    )
    trainer.fit()
    logged = metrics_of(tmp_path / "run")
    assert len(logged) == 2 and "val-core/sums/reward/mean@1" in logged[-1] and len(seen) == 2 * 8 * 4 + 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert type(back) is type(live)
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")("a+b").input_ids
        == tokenizer("a+b").input_ids
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())  # it is only read
    moved = [name for name, tensor in back.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(moved) > 5


def test_what_the_trainer_is_handed_twice_or_not_at_all_is_said():
    config = jaxrl.from_dict({"trainer": {"experiment_name": "x"}, "model": {"path": "m"}})
    with pytest.raises(ValueError, match=r"model\.path is set, and the trainer was handed an object in its place"):
        jaxrl.Trainer(config, model="other", train_dataset=ROWS, reward=len)
    with pytest.raises(ValueError, match=r"^data\.train_files must be set$"):
        jaxrl.Trainer(config)
    with pytest.raises(ValueError, match="there is no reward"):
        jaxrl.Trainer(config, train_dataset=ROWS)
