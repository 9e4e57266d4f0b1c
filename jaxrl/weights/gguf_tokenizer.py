"""The tokenizer inside a GGUF file, written as `tokenizer.json` and what stands beside it in a Hugging Face folder.

Byte-level BPE (GPT-2's kind, which Llama 3, SmolLM and Qwen use), and SentencePiece's BPE, which Llama 1 and 2 and the
first Mistrals use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

from .folder import write_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type
_SPACE = "▁"  # how SentencePiece writes it


def _words(digits: str) -> tuple[PreTokenizer, ...]:
    words = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return Split(Regex(words), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)


_QWEN2, _LLAMA3 = _words(r"\p{N}"), _words(r"\p{N}{1,3}")

# How text is cut into words before the merges, by the name that GGUF has for it.
PRE_TOKENIZERS: dict[str, tuple[PreTokenizer, ...]] = {
    "gpt-2": (ByteLevel(add_prefix_space=False),),
    # Every digit alone and cut from the spaces before it, as SmolLM was trained; merges alone do nearly the same.
    "smollm": (Digits(individual_digits=True), ByteLevel(add_prefix_space=False)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
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


def needed_keys(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """What must be there for a tokenizer to be built."""
    of_kind = "scores" if metadata.get("tokenizer.ggml.model") == "llama" else "merges"
    return tuple(f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", of_kind))


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that the `tokenizer.ggml` keys describe."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise ValueError(
            f"{path} has a tokenizer of kind {kind!r}; jaxrl reads byte-level BPE ('gpt2') and SentencePiece's BPE "
            "('llama') from GGUF"
        )
    tokenizer, adds_bos, special = _BUILDERS[kind](metadata, path)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind in special)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (*special, _USER_DEFINED)
        ]
    )
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", adds_bos and bos_id is not None):
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, bos_id)])
    return tokenizer


_Built = tuple[
    Tokenizer, bool, tuple[int, ...]
]  # whether it adds a first token unless told not to; kinds that are special


def _byte_level(metadata: Mapping[str, Any], path: Path) -> _Built:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path} has pre-tokenizer {pre!r}; jaxrl knows {', '.join(PRE_TOKENIZERS)}")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    is_llama3 = PRE_TOKENIZERS[pre] is _LLAMA3
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[pre]))
    tokenizer.decoder = decoders.ByteLevel()
    if PRE_TOKENIZERS[pre] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, is_llama3, (_CONTROL,)


def _sentencepiece(metadata: Mapping[str, Any], path: Path) -> _Built:
    """As the `tokenizer.json` of Llama 2 has it: a space before every text, bytes for what is not in the vocabulary."""
    del path
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", kinds.index(_UNKNOWN) if _UNKNOWN in kinds else None)
    merges = _merges(vocabulary, metadata["tokenizer.ggml.scores"], kinds)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins_with_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), replace] if begins_with_space else [replace]
    )
    to_text: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)] if begins_with_space else to_text)
    return tokenizer, True, (_UNKNOWN, _CONTROL)


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Every two normal pieces that together are one, the best score first: SentencePiece keeps no merges."""
    normal = {token for token, number in vocabulary.items() if kinds[number] == _NORMAL}
    ranked = []
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[vocabulary[token]], vocabulary[token], left, right))
    return [(left, right) for _, _, left, right in sorted(ranked)]


_BUILDERS: dict[Any, Callable[[Mapping[str, Any], Path], _Built]] = {"gpt2": _byte_level, "llama": _sentencepiece}
