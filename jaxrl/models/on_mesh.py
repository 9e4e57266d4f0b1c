"""Where work is cut over the mesh by hand (`shard_map`): along which axes, in the program that is being traced."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType


def compiler_axes() -> tuple[str, ...]:
    """The mesh axes that the compiler would split along; none: one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)


def axes_along(word: str, size: int) -> tuple[str, ...]:
    """Those of them that split a dimension of this word (`parallel.RULES`); none where they do not divide it."""
    mesh, axes = jax.sharding.get_abstract_mesh(), compiler_axes()
    meant: Any = nn.logical_to_mesh_axes((word,))
    names = (meant[0],) if isinstance(meant[0], str) else meant[0] or ()
    names = tuple(name for name in names if name in axes)
    return names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()
