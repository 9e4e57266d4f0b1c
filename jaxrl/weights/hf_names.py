"""Our names and the Hugging Face names, one row an array: read left to right to load, right to left to export.

The pattern is einops' notation: axes of the Hugging Face tensor -> axes of ours, without the leading axes that stand for
the numbers in the tensor's name (layers, experts). Letters are those of `batch.py` in lower case, c is a label of the
score head. Where a tensor is fused (queries, keys and values in one), each of our arrays has a row with its part.
Loader, exporter and publisher all read these rows; there is no other table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from ..models.config import ModelConfig, Run
from ..models.families import FAMILIES
from .family_names import FAMILY_NAMES, FamilyNames
from .stored import Index

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Stored by old versions of transformers, computed by everyone: rotary frequencies and causal masks.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def class_of(family: str, kind: str) -> str | None:
    """The name that transformers has for a family's class: `kind` is ForCausalLM, ForTokenClassification ...

    None where it has no such class.
    """
    if kind in FAMILIES[family].lacks:
        return None
    name = FAMILIES[family].classes + kind
    return FAMILIES[family].odd_classes.get(name, name)


class Part(NamedTuple):
    """What a fused tensor has more of than ours: of its axis `letter`, `size` long, ours begins at `start`.

    Where ours has that axis too, its own number of entries is taken; where it has not, one.
    """

    letter: str
    start: int
    size: int


@dataclass(frozen=True)
class Row:
    """One of our arrays: `ours` is its path in the parameter tree, `hf` the name of its tensor.

    The first `{}` in the name is a number of `layers`, the second of an expert; ours has a leading axis for each.
    """

    ours: str
    hf: str
    pattern: str
    layers: range = range(0)
    parts: tuple[Part, ...] = ()  # empty: ours is all of the tensor

    @property
    def stacked(self) -> bool:
        """Whether ours has leading axes."""
        return "{}" in self.hf

    @property
    def stack(self) -> str:
        """The letters of the leading axes: layers, experts."""
        return "le"[: self.hf.count("{}")]

    @property
    def groups(self) -> list[list[str]]:
        """The letters of each axis of the Hugging Face tensor: "(n h) d" is [[n, h], [d]]."""
        left = self.pattern.split("->")[0]
        return [(merged or single).split() for merged, single in re.findall(r"\(([^)]*)\)|(\w+)", left)]

    @property
    def letters(self) -> list[str]:
        """The axes of ours, without the leading ones."""
        return self.pattern.split("->")[1].split()

    def stack_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(len(self.layers) if letter == "l" else sizes[letter] for letter in self.stack)

    def places(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that ours is read from, with its index in the leading axes of ours."""
        for place in product(*map(range, self.stack_shape(sizes))):
            yield self.hf_at(place), place

    def hf_at(self, place: tuple[int, ...]) -> str:
        """The name of the tensor at an index of the leading axes."""
        return self.hf.format(*(self.layers[at] if axis == 0 else at for axis, at in enumerate(place)))

    def hf_names(self, sizes: Mapping[str, int]) -> list[str]:
        return [name for name, _ in self.places(sizes)]

    def hf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        sizes = self._hf_sizes(sizes)
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups)

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return (*self.stack_shape(sizes), *(sizes[letter] for letter in self.letters))

    def hf_index(self, index: Index, sizes: Mapping[str, int]) -> Index:
        """Where in the Hugging Face tensor the slice `index` of ours (without the leading axes) lies.

        Of merged axes the outermost is cut and the inner ones are taken whole: rows stay contiguous on disk.
        """
        sizes, where = self._hf_sizes(sizes), []
        for outer, *inner in self.groups:
            block, cut = math.prod(sizes[letter] for letter in inner), self._along(outer, index)
            where.append(slice(cut.start * block, cut.stop * block))
        return tuple(where)

    def to_ours(self, piece: np.ndarray, index: Index, sizes: Mapping[str, int]) -> np.ndarray:
        """What was read at `hf_index(index)`, with our axes: exactly the slice `index` of ours."""
        left, right = self.pattern.split("->")
        sizes = self._hf_sizes(sizes)
        inner = {letter: sizes[letter] for group in self.groups for letter in group[1:]}
        apart = rearrange(piece, f"{left} -> {' '.join(self._axes)}", **inner)
        cuts = [self._along(letter, index) if letter in inner else slice(None) for letter in self._axes]
        return rearrange(apart[tuple(cuts)], f"{self._axes_with_ours} -> {right}")

    def within(self, array: Any) -> tuple[list[int], Index, Any]:
        """Of the Hugging Face tensor, merged axes each by itself: its shape, where ours at one place lies, and ours as
        it lies there."""
        right = self.pattern.split("->")[1]
        sizes = self._hf_sizes(dict(zip(self.letters, array.shape, strict=True)))
        whole = tuple(slice(0, size) for size in array.shape)
        where = tuple(self._along(letter, whole) for letter in self._axes)
        return [sizes[letter] for letter in self._axes], where, rearrange(array, f"{right} -> {self._axes_with_ours}")

    def fill(self, tensor: np.ndarray, array: np.ndarray) -> None:
        """Write ours, at one place, into its part of the Hugging Face tensor."""
        shape, where, ours = self.within(array)
        apart = tensor.reshape(shape)
        assert np.shares_memory(apart, tensor), "a new tensor is contiguous"
        apart[where] = ours

    def to_hf(self, array: Any) -> Any:
        """Ours, at one place -> the Hugging Face tensor, of which it is the whole."""
        assert not self.parts, f"{self.ours} is a part of {self.hf}"
        left, right = self.pattern.split("->")
        return rearrange(array, f"{right} -> {left}")

    @property
    def is_interleaved(self) -> bool:
        """Whether what lies at `hf_index` holds parts of other arrays too, between those of ours."""
        inner = [letter for group in self.groups for letter in group[1:]]
        return any(letter in inner and letter not in self.letters for letter, _, _ in self.parts)

    @property
    def _axes(self) -> list[str]:
        """The letters of the Hugging Face tensor, of merged axes each by itself."""
        return [letter for group in self.groups for letter in group]

    @property
    def _axes_with_ours(self) -> str:
        """The same, and 1 for each that ours has not."""
        return " ".join(letter if letter in self.letters else "1" for letter in self._axes)

    def _along(self, letter: str, index: Index) -> slice:
        """Where along an axis of the Hugging Face tensor the slice `index` of ours lies."""
        start = next((part.start for part in self.parts if part.letter == letter), 0)
        if letter not in self.letters:
            return slice(start, start + 1)
        cut = index[self.letters.index(letter)]
        return slice(start + cut.start, start + cut.stop)

    def _hf_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {**sizes, **{part.letter: part.size for part in self.parts}}


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a checkpoint, and the arrays of ours that it is made of: (row, index in its leading axes)."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Row, tuple[int, ...]], ...]

    @property
    def is_fused(self) -> bool:
        return bool(self.parts[0][0].parts)

    def of(self, pieces: list[Any]) -> Any:
        """The tensor, from the pieces of ours in the order of `parts`; those of a fused one are numpy's."""
        if not self.is_fused:
            return self.parts[0][0].to_hf(pieces[0])
        tensor = np.zeros(self.shape, pieces[0].dtype)
        for (row, _), piece in zip(self.parts, pieces, strict=True):
            row.fill(tensor, piece)
        return tensor


def _user_decoder(config: ModelConfig) -> Any:
    from ..models.decoder import decoder_class  # only for a user's module: names start no JAX

    return decoder_class(config)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """What the letters of the patterns stand for."""
    return (_user_decoder(config).axis_sizes(config) if config.module else {}) | {
        "l": config.num_layers,
        "v": config.vocab_size,
        "d": config.hidden_size,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        "q": config.num_heads * config.head_dim,
        "r": config.num_kv_heads * config.head_dim,
        "f": config.intermediate_size,
        "g": config.expert_size,
        "e": config.num_experts,
        "w": config.table_size,
        "s": config.max_position + config.position_offset,
        "c": config.num_labels,
    }


def rows(config: ModelConfig, *, head: str = "lm") -> list[Row]:
    """Every array of a model in the order of a forward pass; `head` is "lm", or "score" (critic, reward model)."""
    if config.module and head == "score":
        return _user_decoder(config).rows(config, rows(replace(config, module=None)))
    names = FAMILY_NAMES.get(config.family, FamilyNames())
    table = [
        ("embed_tokens.embedding", "embed_tokens", "weight", "v w -> v w", True),
        ("embed_tokens.positions", "embed_positions", "weight", "s d -> s d", config.positions == "learned"),
        ("embed_tokens.norm.scale", "embed_norm", "weight", "d -> d", config.embed_norm),
        ("embed_tokens.norm.bias", "embed_norm", "bias", "d -> d", config.embed_norm),
        ("embed_tokens.project_in.kernel", "project_in", "weight", "d w -> w d", config.embed_size > 0),
        ("norm.scale", "norm", "weight", "d -> d", config.final_norm),
        ("norm.bias", "norm", "bias", "d -> d", config.final_norm and config.norm == "layer"),
        ("project_out.kernel", "project_out", "weight", "w d -> d w", config.embed_size > 0),
    ]
    outside = [Row(ours, f"{names.of(module)}.{leaf}", pattern) for ours, module, leaf, pattern, has in table if has]
    below = [row for row in outside if row.ours.startswith("embed_tokens")]
    above = [row for row in outside if row not in below]
    layers = [row for run in config.runs for row in _layer_rows(config, names, run)]
    return [*below, *layers, *above, *HEADS[head](config, names)]


def in_order(config: ModelConfig, head: str) -> Iterator[HfTensor]:
    """The tensors of a model as they come in a forward pass: those of layers layer by layer."""
    yield from tensors_of(rows(config, head=head), axis_sizes(config))


def tensors_of(table: list[Row], sizes: Mapping[str, int]) -> Iterator[HfTensor]:
    """The tensors that rows are of, those of layers layer by layer, each made of all its parts."""
    for layers, rows_of_run in groupby(table, key=lambda row: row.layers if row.stacked else None):
        of_run = list(rows_of_run)
        if layers is None:
            places = [(row, ()) for row in of_run]
        else:
            places = [(row, place) for row in of_run for _, place in row.places(sizes)]
            places.sort(key=lambda found: found[1][0])  # stable: within a layer as in the table
        made_of: dict[str, list[tuple[Row, tuple[int, ...]]]] = {}
        for row, place in places:
            made_of.setdefault(row.hf_at(place), []).append((row, place))
        for name, parts in made_of.items():
            yield HfTensor(name, parts[0][0].hf_shape(sizes), tuple(parts))


def is_packed(row: Row, config: ModelConfig) -> bool:
    """Whether a row's array is not among the parameters, because the model keeps it in 4 bits."""
    *_, module, leaf = ["", *row.ours.split(".")]
    return config.packed is not None and leaf == "kernel" and module in config.packed.modules


def embedding_of(config: ModelConfig) -> str:
    """The Hugging Face name of the token table."""
    return next(row.hf for row in rows(config) if row.ours == "embed_tokens.embedding")


def score_module(config: ModelConfig) -> str:
    """What transformers calls a score head: that with a bias is of ForTokenClassification."""
    (name,) = (row.hf for row in rows(replace(config, module=None), head="score") if row.ours == "score.kernel")
    return name.removesuffix(".weight")


def head_of(params: Mapping[str, Any], config: ModelConfig) -> str:
    """Which head a tree of parameters carries."""
    return "score" if config.module or "score" in params else "lm"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dict with their paths, "layers.mlp.up_proj.kernel"."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` gives these paths of."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _layer_rows(config: ModelConfig, names: FamilyNames, run: Run) -> list[Row]:
    """The arrays of the layers of a run."""
    has_bias = config.norm == "layer"
    before, output = config.norms != "output", config.norms in ("both", "output")
    own = before and config.parallel != "one_norm"
    table = [
        *_norm(names, "input_layernorm", "d", has_bias, before),
        *_linear(config, names, "self_attn.q_proj", "n h", "d", config.qkv_bias),
        *_linear(config, names, "self_attn.k_proj", "k h", "d", config.qkv_bias),
        *_linear(config, names, "self_attn.v_proj", "k h", "d", config.qkv_bias),
        *_qk_norms(config, names),
        *([_named(names, "self_attn.sinks", "", "n -> n")] if config.sinks else []),
        *_linear(config, names, "self_attn.o_proj", "d", "n h", config.o_bias),
        *_norm(names, "attention_output_norm", "d", has_bias, output),
        *_norm(names, "post_attention_layernorm", "d", has_bias, own),
        *(_experts(config, names) if run.is_sparse else _mlp(config, names)),
        *_norm(names, "mlp_output_norm", "d", has_bias, output),
    ]
    return [
        Row(f"{run.name}.{ours}", f"{names.of('layers')}.{hf}", pattern, run.layers, (part,) if part else ())
        for ours, hf, pattern, part in table
    ]


_Entry = tuple[str, str, str, Part | None]  # ours, the tensor within its layer, pattern, part


def _named(names: FamilyNames, module: str, leaf: str, pattern: str) -> _Entry:
    """A leaf that has the same name on both sides, or no name but that of its module."""
    return f"{module}.{leaf}".rstrip("."), f"{names.of(module)}.{leaf}".rstrip("."), pattern, None


def _norm(names: FamilyNames, module: str, size: str, has_bias: bool, present: bool) -> list[_Entry]:
    if not present:
        return []
    scale = (f"{module}.scale", f"{names.of(module)}.weight", f"{size} -> {size}", None)
    return [scale, _named(names, module, "bias", f"{size} -> {size}")] if has_bias else [scale]


def _qk_norms(config: ModelConfig, names: FamilyNames) -> list[_Entry]:
    if not config.qk_norm:
        return []
    sizes = ("q", "r") if config.qk_norm_over_heads else ("h", "h")
    pairs = zip(("self_attn.q_norm", "self_attn.k_norm"), sizes, strict=True)
    return [entry for module, size in pairs for entry in _norm(names, module, size, False, True)]


def _linear(
    config: ModelConfig, names: FamilyNames, module: str, outputs: str, inputs: str, has_bias: bool
) -> list[_Entry]:
    """Kernel and bias of a product: [out, in] in torch, or [in, out] in GPT-2's Conv1D; whole, or a part of a tensor."""
    axes_out, part = outputs, None
    fused = names.fused.get(module)
    if fused == "heads":  # query, key and value of one head, then of the next
        axes_out, part = outputs.replace(" ", " p "), Part("p", "qkv".index(module[-6]), 3)
    elif fused == "rows":  # all queries, then all keys, then all values; or gate, then up
        part = _part_of_rows(config, module)
    left, right = _merged(axes_out), _merged(inputs)
    left = f"{right} {left}" if names.conv1d else f"{left} {right}"
    hf = names.of(module)
    entries: list[_Entry] = [(f"{module}.kernel", f"{hf}.weight", f"{left} -> {inputs} {outputs}", part)]
    if has_bias:
        entries.append((f"{module}.bias", f"{hf}.bias", f"{_merged(axes_out)} -> {outputs}", part))
    return entries


def _part_of_rows(config: ModelConfig, module: str) -> Part:
    N, K, F = config.num_heads, config.num_kv_heads, config.intermediate_size
    return {
        "self_attn.q_proj": Part("n", 0, N + 2 * K),
        "self_attn.k_proj": Part("k", N, N + 2 * K),
        "self_attn.v_proj": Part("k", N + K, N + 2 * K),
        "mlp.gate_proj": Part("f", 0, 2 * F),
        "mlp.up_proj": Part("f", F, 2 * F),
    }[module]


def _mlp(config: ModelConfig, names: FamilyNames) -> list[_Entry]:
    gate = _linear(config, names, "mlp.gate_proj", "f", "d", config.mlp_bias) if config.gated else []
    return [
        *gate,
        *_linear(config, names, "mlp.up_proj", "f", "d", config.mlp_bias),
        *_linear(config, names, "mlp.down_proj", "d", "f", config.mlp_bias),
    ]


def _experts(config: ModelConfig, names: FamilyNames) -> list[_Entry]:
    router = _linear(config, names, "mlp.router", "e", "d", config.expert_bias)
    gate, up, down = "mlp.expert_gate", "mlp.expert_up", "mlp.expert_down"
    if not names.stacked_experts:  # a tensor for each expert
        matrices = ((gate, "g d -> d g"), (up, "g d -> d g"), (down, "d g -> g d"))
        return [*router, *((f"{module}.kernel", f"{names.of(module)}.weight", axes, None) for module, axes in matrices)]
    hf_gate, hf_down = names.of(gate), names.of(down)  # gate and up of a feature side by side
    return [
        *router,
        (f"{gate}.kernel", hf_gate, "e d (g p) -> e d g", Part("p", 0, 2)),
        (f"{up}.kernel", hf_gate, "e d (g p) -> e d g", Part("p", 1, 2)),
        (f"{gate}.bias", f"{hf_gate}_bias", "e (g p) -> e g", Part("p", 0, 2)),
        (f"{up}.bias", f"{hf_gate}_bias", "e (g p) -> e g", Part("p", 1, 2)),
        (f"{down}.kernel", hf_down, "e g d -> e g d", None),
        (f"{down}.bias", f"{hf_down}_bias", "e d -> e d", None),
    ]


def _merged(letters: str) -> str:
    return f"({letters})" if " " in letters else letters


def _lm_rows(config: ModelConfig, names: FamilyNames) -> list[Row]:
    if config.tie_embeddings:
        return []
    head = names.of("lm_head")
    kernel = Row("lm_head.kernel", f"{head}.weight", "v w -> v w")
    return [kernel, Row("lm_head.bias", f"{head}.bias", "v -> v")] if config.lm_head_bias else [kernel]


def _score_rows(config: ModelConfig, names: FamilyNames) -> list[Row]:
    head = names.token_head if config.score_bias else "score"
    kernel = Row("score.kernel", f"{head}.weight", "c w -> w c")
    return [kernel, Row("score.bias", f"{head}.bias", "c -> c")] if config.score_bias else [kernel]


HEADS = {"lm": _lm_rows, "score": _score_rows}
