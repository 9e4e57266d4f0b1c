"""Kernels that stay in 4 bits on the device (QLoRA, arXiv:2305.14314), turned into numbers inside their product alone.

They lie in the collection "packed" as bitsandbytes stores them: a matrix [out, in] row by row, blocks of `blocksize`
numbers with one scale each, the scales 8-bit codes themselves where they are quantised twice. Numbers exist for one
matrix at a time, forward and backward: the product is under `jax.checkpoint`, so what is kept for the gradient is the
input and the codes. Gradients go to the input; the codes have none.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from .config import PackedKernels

Parts = dict[str, Array]


class Part(NamedTuple):
    """Shape, dtype and logical axes of one array of a packed kernel."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


def packed_parts(packed: PackedKernels, num_out: int, num_in: int) -> dict[str, Part]:
    """The arrays of one kernel [num_out, num_in], under the names of bitsandbytes.

    Codes and scales are split over the mesh by whole rows. Where a row is no whole number of blocks, the scales (a
    thirty-second of the codes, or an eighth) are replicated. So are the scales of scales and the tables.
    """
    blocks = -(-num_out * num_in // packed.blocksize)
    row_blocks, rest = divmod(num_in, packed.blocksize)
    scales = ((blocks,), (None,)) if rest else ((num_out, row_blocks), ("packed_rows", None))
    parts = {
        "codes": Part((num_out, num_in // 2), "uint8", ("packed_rows", None)),
        "absmax": Part(scales[0], "uint8" if packed.is_double else "float32", scales[1]),
        "quant_map": Part((16,), "float32", (None,)),
    }
    if packed.is_double:
        parts["nested_absmax"] = Part((-(-blocks // packed.nested_blocksize),), "float32", (None,))
        parts["nested_quant_map"] = Part((256,), "float32", (None,))
        parts["nested_offset"] = Part((), "float32", ())
    return parts


def packed_product(
    x: Array, parts: Parts, packed: PackedKernels, shape: tuple[int, ...], axes: tuple[str | None, ...], num_in: int
) -> Array:
    """x [B T in..] times the kernel whose plain form is [in.. out..] with these logical `axes`, in the dtype of x."""

    # Without barriers against CSE: forward and backward are two loops over the layers, with nothing in common.
    @partial(jax.checkpoint, prevent_cse=False)
    def product(x: Array, parts: Parts) -> Array:
        kernel = dequantize(parts, packed, shape[num_in:] + shape[:num_in], axes[num_in:] + axes[:num_in])
        contracted = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(kernel.ndim - num_in, kernel.ndim))
        return jax.lax.dot_general(x, kernel.astype(x.dtype), (contracted, ((), ())))

    return product(x, parts)


def dequantize(parts: Parts, packed: PackedKernels, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
    """The kernel [out.. in..] as numbers of `packed.dtype`, equal to those of bitsandbytes bit for bit."""
    codes = parts["codes"].reshape(*shape[:-1], shape[-1] // 2)
    # Over `fsdp` the codes are gathered, a quarter of the bytes of bfloat16; over `tensor` each device has its part.
    codes = nn.with_logical_constraint(codes, tuple(None if name == "embed" else name for name in axes))
    codes = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(shape)
    scales = jnp.repeat(_scales(parts, packed), packed.blocksize)[: math.prod(shape)].reshape(shape)
    return _rounded(_looked_up(parts["quant_map"], codes) * scales, packed.dtype)


def _scales(parts: Parts, packed: PackedKernels) -> Float[Array, "blocks"]:
    absmax = parts["absmax"].reshape(-1)
    if not packed.is_double:
        return absmax
    outer = jnp.repeat(parts["nested_absmax"], packed.nested_blocksize)[: absmax.size]
    product = parts["nested_quant_map"][absmax] * outer
    # Always the product. The select keeps compilers from a fused multiply-add, which rounds once and not twice.
    product = jnp.where(product == product, product, 0.0)
    return product + parts["nested_offset"]


def _looked_up(table: Float[Array, "16"], codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """table[codes] by four rounds of selects, which fuse with what follows; a gather does not."""
    values: list[Any] = list(table)
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, one, zero) for zero, one in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _rounded(values: Float[Array, "..."], dtype: str) -> Array:
    if dtype == "bfloat16":  # said in so many words: XLA may leave out a cast that another undoes
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7).astype(dtype)
    return values.astype(dtype)
