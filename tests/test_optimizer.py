"""The optimizer against torch, the schedules against worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.optimizer import abstract_state, lr_schedule, make_optimizer
from jaxrl.parallel import make_mesh

LEARNING_RATES = (1e-2, 5e-3, 2e-2, 1e-2, 0.0, 3e-3)


def some_params() -> dict:
    rng = np.random.default_rng(0)
    shapes = {"embed": (7, 3), "norm": (3,), "mlp": (3, 5)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def some_grads(params: dict, scale: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32) for name, p in params.items()}


@pytest.mark.parametrize("clip_grad", [1.0, 1e-3, None])
def test_update_matches_torch_adamw_with_clip_grad_norm(clip_grad):
    params = some_params()
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(p))) for name, p in params.items()}
    torch_optimizer = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    optimizer = make_optimizer(betas=(0.9, 0.99), weight_decay=0.1, clip_grad=clip_grad)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step, lr in enumerate(LEARNING_RATES):
        grads = some_grads(params, scale=0.01 if step % 2 else 3.0, seed=step)  # below and above the clip
        for name, p in theirs.items():
            p.grad = torch.tensor(np.asarray(grads[name]))
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), clip_grad if clip_grad is not None else 1e9)
        torch_optimizer.param_groups[0]["lr"] = lr
        torch_optimizer.step()
        params, state, norm = update(grads, state, params, lr)
        np.testing.assert_allclose(norm, their_norm.item(), rtol=1e-6)
        for name, p in theirs.items():
            np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_a_norm_that_is_not_finite_leaves_parameters_and_moments_as_they_are(moments_dtype):
    params = some_params()
    optimizer = make_optimizer(moments_dtype=moments_dtype)
    update = jax.jit(optimizer.update)
    params, state, _ = update(some_grads(params, 1.0, 0), optimizer.init(params), params, 1e-2)
    for bad in (jnp.nan, jnp.inf, 1e30):  # the square of 1e30 overflows float32
        grads = some_grads(params, 1.0, 1)
        grads["norm"] = grads["norm"].at[1].set(bad)
        new_params, new_state, norm = update(grads, state, params, 1e-2)
        assert not np.isfinite(norm)
        jax.tree.map(np.testing.assert_array_equal, (new_params, new_state), (params, state))


def test_clipping_and_moments_are_float32_when_gradients_are_bfloat16():
    params = some_params()
    optimizer = make_optimizer()
    grads = some_grads(params, 1.0, 0)
    low = optax.tree.cast(grads, jnp.bfloat16)
    exact = optax.tree.cast(low, jnp.float32)
    state = optimizer.init(params)
    results = [jax.jit(optimizer.update)(grads, state, params, 1e-2) for grads in (low, exact)]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_bfloat16_second_moment_follows_what_rounding_to_nearest_would_lose():
    params = {"w": jnp.ones(4096)}
    grads = {"w": jnp.full(4096, 1e-2)}
    low, full = make_optimizer(moments_dtype="bfloat16"), make_optimizer()
    low_state, full_state = low.init(params), full.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((low_state.mu, low_state.nu))} == {jnp.dtype("bfloat16")}
    low_update, full_update = jax.jit(low.update), jax.jit(full.update)
    for _ in range(300):
        _, low_state, _ = low_update(grads, low_state, params, 0.0)
        _, full_state, _ = full_update(grads, full_state, params, 0.0)
    mean = np.asarray(low_state.nu["w"], np.float32).mean()
    # One entry strays by about 1 %; the mean over 4096 by a 64th of that.
    np.testing.assert_allclose(mean, full_state.nu["w"].mean(), rtol=2e-3)
    nearest = jnp.bfloat16(0.0)
    for _ in range(300):
        nearest = jnp.bfloat16(0.999 * nearest.astype(jnp.float32) + 0.001 * 1e-4)
    assert abs(float(nearest) / float(full_state.nu["w"][0]) - 1) > 0.02


def test_bfloat16_parameters_take_in_the_mean_steps_that_they_cannot_show():
    params = {"w": jnp.ones(100_000, jnp.bfloat16)}
    grads = {"w": jnp.full(100_000, 1e-3, jnp.bfloat16)}
    optimizer = make_optimizer(weight_decay=0.0)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("float32")}
    for _ in range(20):
        params, state, _ = update(grads, state, params, 1e-5)  # the next number below 1 is 0.996
    w = np.asarray(params["w"], np.float64)
    assert params["w"].dtype == jnp.bfloat16 and 1 < len(set(w)) < 5
    np.testing.assert_allclose(1 - w.mean(), 20 * 1e-5, rtol=0.05)  # one entry is 0 or 0.004 away
    broken, _, norm = update({"w": grads["w"].at[0].set(jnp.inf)}, state, params, 1e-5)
    assert not np.isfinite(norm)
    np.testing.assert_array_equal(broken["w"], params["w"])


def test_parameters_of_other_types_are_refused_by_name():
    with pytest.raises(ValueError, match=r"layers\.kernel is float16.*float32, or in bfloat16"):
        make_optimizer().init({"layers": {"kernel": jnp.ones(2, jnp.float16)}})
    with pytest.raises(ValueError, match="float16.*float32, bfloat16"):
        make_optimizer(moments_dtype="float16")


def test_moments_live_where_their_parameters_live():
    mesh = make_mesh(1, 1, 1)
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    params = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=split)}
    optimizer = make_optimizer(moments_dtype="bfloat16")
    abstract = abstract_state(optimizer, params)
    assert abstract.mu["w"].sharding == abstract.nu["w"].sharding == split
    assert abstract.num_updates.sharding == NamedSharding(mesh, PartitionSpec())
    real = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))({"w": jnp.ones((4, 2))})
    for planned, found in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (planned.shape, planned.dtype, planned.sharding) == (found.shape, found.dtype, found.sharding)


def test_schedules_give_worked_numbers():
    constant = lr_schedule("constant", lr=2.0, total_steps=10)
    assert [constant(step) for step in (0, 5, 100)] == [2.0, 2.0, 2.0]
    warm = lr_schedule("constant", lr=2.0, total_steps=10, warmup_steps=4)
    assert [warm(step) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    cosine = lr_schedule("cosine", lr=1.0, total_steps=10, warmup_ratio=0.2, min_lr_ratio=0.1)
    np.testing.assert_allclose([cosine(step) for step in (0, 1, 2, 6, 10, 50)], [0.0, 0.5, 1.0, 0.55, 0.1, 0.1])
    two_waves = lr_schedule("cosine", lr=1.0, total_steps=8, num_cycles=2.0)
    np.testing.assert_allclose([two_waves(step) for step in (0, 2, 4, 8)], [1.0, 0.0, 1.0, 1.0], atol=1e-12)
    linear = lr_schedule("linear", lr=1.0, total_steps=10, warmup_steps=2, min_lr_ratio=0.5)
    np.testing.assert_allclose([linear(step) for step in (1, 2, 6, 10, 11)], [0.5, 1.0, 0.75, 0.5, 0.5])


def test_a_wrong_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'cosin' is not one of constant, linear, cosine"):
        lr_schedule("cosin", lr=1.0, total_steps=1)
    with pytest.raises(ValueError, match="min_lr_ratio 1.5"):
        lr_schedule("cosine", lr=1.0, total_steps=1, min_lr_ratio=1.5)
