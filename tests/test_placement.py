"""Where weights, optimizer state and activations lie: a step with any placement on any mesh is the step of one device."""

import dataclasses
from collections.abc import Iterator
from functools import cache

import jax
import numpy as np
import pytest
import test_parallel as step

from jaxrl.batch import Prompt
from jaxrl.config import from_dict
from jaxrl.offload import HOST_KIND, waiting, waits
from jaxrl.parallel import generation_mesh, make_mesh
from jaxrl.roles import abstract_train_state, new_train_state
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.weights.export import hf_tensors

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
PLACEMENTS = {  # what of the model's config changes, and what waits in host memory
    "optimizer on the host": ({}, ("optimizer",)),
    "all on the host": ({"remat": "full"}, ("optimizer", "params")),
    "activations on the host": ({"remat": "offload"}, ()),
    "tokens split between blocks": ({"shard_tokens": "blocks", "remat": "dots"}, ()),
    "tokens split in attention": ({"shard_tokens": "attention"}, ()),
}
quick_compiles = step.quick_compiles


def steps(mesh, head: str, changes: dict, offload: tuple[str, ...]) -> Iterator[tuple]:
    """State and metrics after one step, and logprobs or values before it: of packed and of padded rows."""
    programs, _ = step.role(mesh, head)
    programs.config = dataclasses.replace(programs.config, **changes)
    for rows in step.packed_and_padded(mesh):
        params = step.load(mesh, head)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        if "params" in offload:
            abstract = waiting(abstract)
            params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract))
        wanted = abstract_train_state(programs.optimizer, {"params": abstract}, offload)
        state = new_train_state(mesh, programs.optimizer, {"params": params}, wanted)
        forward = programs.logprobs if head == "lm" else programs.values
        before = forward(state.trained, rows)
        state, metrics = programs.step(state, {}, rows, step.targets_of(programs.Targets, rows), step.LR)
        for kind, tree in (("params", state.trained), ("optimizer", state.opt_state.mu)):
            for path, x in jax.tree.leaves_with_path(tree):  # what was on the host is there again
                assert x.sharding.memory_kind == (HOST_KIND if kind in offload and waits(path, x) else "device"), path
        yield before, jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize("head", ["lm", "score"], ids=["actor", "critic"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "x".join(map(str, shape)))
def test_a_step_with_any_placement_is_the_step_of_one_device_packed_and_padded(shape, placement, head):
    expected = step.reference(head)
    for before, state, metrics in steps(make_mesh(*shape), head, *PLACEMENTS[placement]):
        before = (before.logprobs, before.entropy) if head == "lm" else (before,)
        for got, plain in zip(before, expected.per_token, strict=True):
            np.testing.assert_allclose(got, np.where(step.SEQUENCES.present, plain, 0.0), atol=1e-5)
        # Float32 rounding of sums in another order, with the tolerances of test_parallel.py.
        step.assert_trees_close(metrics["losses"], expected.losses, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], expected.norm, rtol=1e-5)
        moments = jax.tree.map(lambda m: m / 0.1, state.opt_state.mu["params"])
        step.assert_trees_close(moments, expected.gradient, rtol=1e-4, atol=1e-6)
        step.assert_trees_close(state.trained["params"], expected.stepped, rtol=1e-6, atol=1e-6)


def test_weights_in_host_memory_are_exported_and_given_to_the_engine_as_from_the_device():
    mesh = make_mesh(2, 2, 2)
    here = step.load(mesh, "lm")
    abstract = waiting(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), here))
    there = jax.device_put(here, jax.tree.map(lambda x: x.sharding, abstract))
    model = step.model("lm")
    for (name, tensor), (_, expected) in zip(hf_tensors(there, model), hf_tensors(here, model), strict=True):
        np.testing.assert_array_equal(tensor, expected, err_msg=name)
    engine = JaxEngine(model, mesh)
    engine.update_weights({"params": there}, 0)
    weights = engine.weights
    engine.update_weights({"params": here}, 1)
    step.assert_trees_close(weights, engine.weights, rtol=0, atol=0)


# Generation in another layout than training.


def test_weights_move_to_the_layout_of_generation_in_one_program_and_answers_stay_the_same():
    training = make_mesh(2, 4, 1)
    params = {"params": step.load(training, "lm")}
    prompts = [Prompt([5 + i, 7, 9 + i], "", "test", None, {}, None, i) for i in range(8)]
    sampling = Sampling(max_tokens=6, temperature=0.0)
    answers = {}
    for tensor in (None, 2):
        engine = JaxEngine(step.model("lm"), generation_mesh(training, tensor), max_num_seqs=8)
        with jax.transfer_guard_device_to_host("disallow"), jax.transfer_guard_host_to_device("disallow"):
            engine.update_weights(params, 0)
        answers[tensor] = engine.generate(prompts, sampling, seed=0)
        q_proj = engine.weights["layers"][0]["params"]["self_attn"]["q_proj"]["kernel"]  # [D, N, H]
        assert q_proj.addressable_shards[0].data.shape == (32, 4 // (tensor or 1), 16)
        assert engine.weights_gb > 0
    for whole, split in zip(answers[None], answers[2], strict=True):
        np.testing.assert_array_equal(whole.token_ids, split.token_ids)
        np.testing.assert_allclose(whole.logprobs, split.logprobs, atol=1e-5)


def test_a_layout_of_generation_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(
        ValueError, match="tensor_model_parallel_size 3 does not divide the 8 devices .* one of 1, 2, 4, 8"
    ):
        generation_mesh(make_mesh(1, 8, 1), 3)


@cache
def given() -> dict:
    return {
        "model": {"path": "x"}, "data": {"train_files": "x"}, "reward": {"functions": [{"name": "gsm8k"}]},
        "trainer": {"experiment_name": "x"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"actor": {"offload": ["moments"]}}, "actor.offload holds moments: it may hold optimizer and params"),
        ({"ref": {"offload": ["optimizer"]}}, "ref.offload holds optimizer: it may hold params"),
        ({"reward": {"model": {"offload": ["layers"]}}}, "reward.model.offload holds layers: it may hold params"),
        ({"mesh": {"tensor": 3}, "model": {"shard_tokens": "blocks"}}, "rows of 1024 tokens over mesh.tensor 3, which"),
        ({"model": {"shard_tokens": "attention", "attention": "cudnn"}}, "shard_tokens attention needs .* xla"),
        ({"model": {"remat": "some"}}, "model.remat is 'some' and must be one of none, dots, full, offload"),
    ],
)
def test_a_placement_that_cannot_be_is_refused_in_words(sections, message):
    with pytest.raises(ValueError, match=message):
        from_dict({name: given().get(name, {}) | sections.get(name, {}) for name in given() | sections})
