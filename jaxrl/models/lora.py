"""Adapters folded into the weights they adapt: for exporting a plain model. `layers.Dense` applies them in training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .config import ModelConfig

Tree = dict[str, Any]


def merge_lora(config: ModelConfig, variables: Tree) -> Tree:
    """The "params" of a model without adapters that computes what `variables` ("params" and "lora") do.

    W' = W + lora_scale * A B for every adapted layer; both are stacked over layers.
    """

    def fold(params: Tree, adapters: Tree) -> Tree:
        if "a" in adapters:
            delta = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(adapters["a"], adapters["b"])
            kernel = params["kernel"].astype(delta.dtype) + config.lora_scale * delta
            return params | {"kernel": kernel}
        return params | {name: fold(params[name], inner) for name, inner in adapters.items()}

    return fold(variables["params"], variables.get("lora", {}))
