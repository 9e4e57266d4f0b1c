"""Experts on the tokens that were sent to them are every expert on every token, weighed by the router."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.models import routed as module
from jaxrl.models.moe import expert
from jaxrl.models.routed import FEWEST_TOKENS, Blocks, block_size, routed
from jaxrl.parallel import make_mesh, use_mesh, within_replica

B, T, C, E, D, F = 4, 40, 2, 6, 16, 24
random = np.random.default_rng(0)


def normal(*shape) -> jax.Array:
    return jnp.asarray(0.4 * random.normal(size=shape), jnp.float32)


def matrix(num_in: int, num_out: int) -> dict:
    return {"kernel": normal(E, num_in, num_out), "bias": normal(E, num_out)}


WEIGHTS = {"gate": matrix(D, F), "up": matrix(D, F), "down": matrix(F, D)}
X, G = 3 * normal(B, T, D), normal(B, T, D)
CHOSEN = jnp.asarray(np.stack([random.permutation(E)[:C] for _ in range(B * T)]).reshape(B, T, C))
SHARE = jax.nn.softmax(normal(B, T, C))
gpt_oss = partial(expert, "silu", 7.0)


def everyone(weights, x, chosen, share):
    """Every expert computes every token."""
    said = jax.vmap(partial(expert, "silu", 7.0), in_axes=(0, None))(weights, x.reshape(-1, D)).reshape(-1, *x.shape)
    shares = jnp.einsum("btc,btce->ebt", share, jax.nn.one_hot(chosen, len(said)))
    return jnp.einsum("ebtd,ebt->btd", said, shares)


def results(function, chosen=CHOSEN, x=X):
    """The outputs, and the gradients of weights, x and share."""

    def of(weights, x, share):
        out = function(weights, x, chosen, share)
        return jnp.sum(out * G), out

    (_, out), grads = jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True))(WEIGHTS, x, SHARE)
    return {"out": out, "weights": grads[0], "x": grads[1], "share": grads[2]}


def check(got, expected, **tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a, b, err_msg=jax.tree_util.keystr(path), **(tolerance or {"rtol": 1e-4, "atol": 2e-5})
        )


@pytest.mark.parametrize("size", [16, 64])
def test_the_chosen_experts_alone_give_outputs_and_gradients_of_all(size, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_TOKENS", size)
    check(results(partial(routed, gpt_oss)), results(everyone))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 1), (1, 1, 2), (2, 1, 4), (8, 1, 1)])
def test_on_a_mesh_as_on_one_device(shape):
    """Four ways do not divide six experts, nor eight the four rows: the tokens of a row are split, and rows are not."""
    with use_mesh(make_mesh(*shape)):
        got = results(partial(routed, gpt_oss))
    check(got, results(everyone))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_no_device_waits_for_another_while_its_blocks_run(shape):
    """One sum over the experts' devices after the loop; within it there is no collective, and no weight travels."""
    mesh = make_mesh(*shape)
    with use_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        x, chosen, share = jax.device_put((X, CHOSEN, SHARE), rows)
        weights = jax.device_put(WEIGHTS, NamedSharding(mesh, P("tensor" if E % shape[2] == 0 else None)))
        grad = jax.jit(jax.grad(lambda w, x, s: jnp.sum(routed(gpt_oss, w, x, chosen, s) * G), argnums=(0, 1, 2)))
        text = grad.lower(weights, x, share).compile().as_text()
    loops = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert len(loops) >= 2
    for body in re.split(r"\n(?=%?\S)", text):
        if body.lstrip("%").split(" ")[0] in loops:
            assert not re.search(r" (all-|reduce-scatter|collective)", body), body[:300]
    assert "all-gather" not in text or E % shape[2]  # a whole row's tokens come together where they were split


def test_within_a_program_that_is_cut_along_data_by_hand():
    mesh = make_mesh(2, 1, 2)

    def of_replica(weights, x, chosen, share):
        with within_replica():
            return routed(gpt_oss, weights, x, chosen, share)

    rows = P("data")
    cut = partial(jax.shard_map, mesh=mesh, axis_names={"data"}, check_vma=False)
    with use_mesh(mesh):
        got = results(cut(of_replica, in_specs=(P(), rows, rows, rows), out_specs=rows))
    check(got, results(everyone))


def test_one_expert_may_get_every_token_and_the_others_nothing():
    chosen = jnp.broadcast_to(jnp.array([5, 2]), CHOSEN.shape)
    got = results(partial(routed, gpt_oss), chosen)
    check(got, results(everyone, chosen))
    for leaf in jax.tree.leaves(got["weights"]):
        assert np.abs(leaf[np.array([2, 5])]).max() > 0 and not np.any(leaf[np.array([0, 1, 3, 4])])


def test_in_bfloat16_the_gradient_of_the_weights_is_summed_in_float32():
    got, exact = results(partial(routed, gpt_oss), x=X.astype(jnp.bfloat16)), results(everyone)
    for (path, g), e in zip(jax.tree.leaves_with_path(got["weights"]), jax.tree.leaves(exact["weights"]), strict=True):
        assert g.dtype == jnp.float32
        if "kernel" in jax.tree_util.keystr(path):
            assert np.mean(np.asarray(g) == np.asarray(g.astype(jnp.bfloat16), np.float32)) < 0.5
        np.testing.assert_allclose(g, e, atol=0.05 * np.abs(e).max())
    assert got["out"].dtype == got["x"].dtype == jnp.bfloat16


def test_blocks_hold_every_pair_once_and_only_those_of_their_expert():
    chosen = jnp.where(CHOSEN < 4, CHOSEN, -1 + 100 * (CHOSEN - 4))  # the last two are somebody else's: -1 and 99
    blocks, of_pair, found = Blocks.of(chosen, 4, 16), np.asarray(chosen).reshape(-1), []
    for block in range(int(blocks.block_ends[-1])):
        e, pairs = blocks.numbered(jnp.int32(block))
        there = np.asarray(pairs[pairs < of_pair.size])
        assert len(there) and set(of_pair[there]) == {int(e)}
        found += there.tolist()
    assert sorted(found) == np.flatnonzero((of_pair >= 0) & (of_pair < 4)).tolist()


def test_blocks_of_an_even_router_are_three_quarters_full_or_more():
    for num_pairs in (4096, 8192, 12_000, 65_536):
        size, mean = block_size(num_pairs, 128), num_pairs / 128
        assert mean / (-(-mean // size) * size) >= (0.75 if mean >= 2 * FEWEST_TOKENS else 0.5)


def test_a_token_that_one_expert_cannot_bear_is_no_business_of_the_others():
    chosen = jnp.zeros_like(CHOSEN).at[..., 1].set(1).at[0, 0].set(jnp.array([2, 3]))
    x = X.at[0, 0].set(1e30)  # with which products overflow
    out = routed(partial(expert, "silu", 0.0), WEIGHTS, x, chosen, SHARE)
    assert not np.isfinite(out[0, 0]).all() and np.isfinite(out.reshape(-1, D)[1:]).all()


def test_memory_does_not_grow_with_the_tokens_an_expert_could_have_got():
    """What every expert would say of every token is [E, tokens, F]: here 402 MB, forward alone."""
    E, N, D, F = 64, 4096, 64, 384

    def of(weights, x, chosen, share):
        return jnp.sum(routed(partial(expert, "silu", 0.0), weights, x, chosen, share))

    def shape(*s, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(s, dtype)

    weights = {name: {"kernel": shape(E, *s)} for name, s in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D)))}
    args = weights, shape(1, N, D), shape(1, N, 4, dtype=jnp.int32), shape(1, N, 4)
    compiled = jax.jit(jax.grad(of, argnums=(0, 1))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 60e6  # the weights' gradient is 19 MB
