"""The tokenizer inside a GGUF file, written as `tokenizer.json` and what stands beside it in a Hugging Face folder.

Byte-level BPE only (GPT-2's kind, which Llama 3, SmolLM and Qwen use).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

from .folder import write_json

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How text is cut into words before the merges, by the name that GGUF has for it.
PRE_TOKENIZERS: dict[str, tuple[PreTokenizer, ...]] = {
    "gpt-2": (ByteLevel(add_prefix_space=False),),
    # Every digit alone and cut from the spaces before it, as SmolLM was trained; merges alone do nearly the same.
    "smollm": (Digits(individual_digits=True), ByteLevel(add_prefix_space=False)),
    "qwen2": (
        Split(Regex(_QWEN2_WORDS), behavior="isolated"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ),
}


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, path: Path) -> None:
    """Write tokenizer, special tokens and chat template of the GGUF file `path`, whose metadata is given."""
    special = {}
    tokens = metadata["tokenizer.ggml.tokens"]
    for name, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            special[f"{ours}_token"] = tokens[token_id]
    build_tokenizer(metadata, path).save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that the `tokenizer.ggml` keys describe."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"{path} has a tokenizer of kind {kind!r}; jaxrl reads byte-level BPE ('gpt2') from GGUF")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path} has pre-tokenizer {pre!r}; jaxrl knows {', '.join(PRE_TOKENIZERS)}")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[pre]))
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    kinds = metadata["tokenizer.ggml.token_type"]
    added = {number: kind for number, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)}
    tokenizer.add_tokens(
        [AddedToken(tokens[number], normalized=False, special=kind == _CONTROL) for number, kind in added.items()]
    )
    if metadata.get("tokenizer.ggml.add_bos_token"):
        number = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[number]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, number)])
    return tokenizer
