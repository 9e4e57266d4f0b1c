"""The mesh: whatever its shape, a step of PPO is that of one device and of the formulas; weights really are split."""

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrl.batch import PolicyTargets, Prompt, Rollout, ValueTargets
from jaxrl.models import decoder
from jaxrl.models.config import ModelConfig
from jaxrl.models.logprobs import target_logprobs
from jaxrl.optimizer import abstract_state, make_optimizer
from jaxrl.packing import Layout, Sequences, _fill, pack
from jaxrl.parallel import make_mesh, num_row_shards, partition, put_rows, use_mesh, with_shardings
from jaxrl.update import NO_COMPRESSION, Compression, Critic, Policy, PolicyLoss, TrainState
from jaxrl.weights.load import load_hf_config, load_params

QWEN3 = Path(__file__).parent / "data" / "hf_torch" / "qwen3"  # D 32, F 40, N 4, K 2, H 16, V 80, two layers
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 2), (1, 1, 8), (2, 2, 2)]
# The first step of Adam is the sign of the gradient, which rounding may turn where it is 0: a large epsilon smooths it.
LR, EPS, WEIGHT_DECAY = 1e-2, 1e-2, 0.01
CLIP_GRAD = 1.0
CLIP, DUAL_CLIP, ENTROPY_COEFF, KL_COEF, VALUE_CLIP = 0.2, 3.0, 0.01, 0.1, 0.5


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Without LLVM's passes, which take half the time of compiling. What XLA does to a program stays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def model(head: str) -> ModelConfig:
    return ModelConfig.from_hf(load_hf_config(QWEN3), score_bias=head == "score")


def load(mesh, head: str):
    """The weights of a role where they belong on the mesh; the score head, which is not in the file, is made here."""
    config = model(head)
    shapes, axes = decoder.abstract_params(config, head)
    wanted = with_shardings(mesh, shapes["params"], axes["params"])
    params = load_params(QWEN3, config, wanted, allow_missing={"score.kernel", "score.bias"})
    if head == "score":
        kernel = 0.1 * np.random.default_rng(1).normal(size=(config.hidden_size, 1)).astype(np.float32)
        made = {"kernel": kernel, "bias": np.full(1, 0.2, np.float32)}
        params["score"] = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), made, wanted["score"])
    return params


def init_state(optimizer, trained) -> TrainState:
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, trained))
    return TrainState(trained, jax.jit(optimizer.init, out_shardings=shardings)(trained))


def make_batch() -> tuple[Sequences, dict[str, np.ndarray]]:
    """24 sequences in 12 groups, and for each token the numbers that the losses want, as [B, T]."""
    random = np.random.default_rng(0)
    draw = lambda low, high: random.integers(1, 80, random.integers(low, high)).astype(np.int32)  # noqa: E731
    prompts = [Prompt(draw(4, 9).tolist(), "", "test", None, {}, None, index) for index in range(12)]
    rollouts = []
    for b in range(24):
        tokens = draw(3, 9)
        made_by_model = random.random(len(tokens)) > 0.125
        rollouts.append(Rollout(b // 2, tokens, np.zeros(len(tokens), np.float32), True, 0, made_by_model))
    sequences = Sequences.of(prompts, rollouts, 8)
    mask = sequences.mask.astype(np.float32)
    noise = {name: random.normal(size=mask.shape).astype(np.float32) for name in ("old", "adv", "ref", "weight", "ret")}
    numbers = {
        "old_logprobs": -4.0 + noise["old"],  # about one from the policy's: tokens inside and outside of the clip
        "advantages": noise["adv"],
        "ref_logprobs": -4.0 + noise["ref"],
        "rollout_weights": np.exp(0.2 * noise["weight"]),
        "old_values": 0.5 * noise["old"],
        "returns": noise["ret"],
        "loss_weights": mask / mask.sum(),
        "term_weights": mask / mask.sum(),
    }
    return sequences, numbers


SEQUENCES, NUMBERS = make_batch()


def layout(mesh) -> Layout:
    return layout_in(num_row_shards(mesh))


@cache
def layout_in(ways: int) -> Layout:
    """Eight rows a micro-batch, so that any of the meshes can split them; two micro-batches, and room for a third."""
    packed = pack(SEQUENCES, range(24), row_length=20, rows_per_micro_batch=8, max_micro_batches=3, ways=ways)
    assert packed.num_micro_batches == 2 and packed.rows.segments.max() > 2
    return packed


@cache
def padded_in(ways: int) -> Layout:
    """In the same shapes each sequence in a row of its own: three micro-batches."""
    places = [(b // 8, b % 8, [(0, int(SEQUENCES.group[b]), [b])]) for b in range(24)]
    padded = _fill(SEQUENCES, places, (3, 8, 20), ways, 3)
    assert padded.rows.segments.max() == 1 and (padded.rows.segments == 0).any()
    return padded


def packed_and_padded(mesh) -> tuple[Layout, Layout]:
    return layout(mesh), padded_in(num_row_shards(mesh))


def targets_of(kind, rows: Layout):
    return kind(*(rows.to_slots(np.float32(NUMBERS[name])) for name in kind._fields))


# The reference: one device, no mesh, no packing, the formulas as the papers have them.


def plain_hidden(config, params, head: str):
    """[B, T, D]: the states that predict the response tokens, each sequence in a row of its own."""
    prompts = [SEQUENCES.prompts[g] for g in SEQUENCES.group]
    width = max(map(len, prompts)) + SEQUENCES.tokens.shape[1]
    tokens, segments = np.zeros((2, len(prompts), width), np.int32)
    columns = np.zeros(SEQUENCES.tokens.shape, np.int32)
    for b, prompt in enumerate(prompts):
        whole = [*prompt, *SEQUENCES.tokens[b, : SEQUENCES.lengths[b]]]
        tokens[b, : len(whole)], segments[b, : len(whole)] = whole, 1
        columns[b] = len(prompt) - 1 + np.arange(columns.shape[1])
    positions = np.broadcast_to(np.arange(width), tokens.shape)
    rows = map(jnp.asarray, (tokens, positions, segments, segments))
    hidden = decoder.hidden_states(config, {"params": params}, *rows, head=head)
    return jnp.take_along_axis(hidden, columns[..., None], axis=1)


def policy_loss(params):
    config, n = model("lm"), NUMBERS
    logits = plain_hidden(config, params, "lm") @ decoder.head_table(config, params).T
    log_p = jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(log_p, SEQUENCES.tokens[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    ratio = jnp.exp(logprobs - n["old_logprobs"])
    unclipped = -n["advantages"] * ratio
    token_loss = jnp.maximum(unclipped, -n["advantages"] * jnp.clip(ratio, 1 - CLIP, 1 + CLIP))
    dual = jnp.minimum(token_loss, -n["advantages"] * DUAL_CLIP)
    token_loss = jnp.where(n["advantages"] < 0, dual, token_loss) * n["rollout_weights"]
    log_ratio = n["ref_logprobs"] - logprobs
    kl = jnp.minimum(jnp.exp(log_ratio) - log_ratio - 1, 10.0)
    losses = {"pg_loss": token_loss, "entropy_loss": entropy, "kl_loss": kl}
    losses = {name: jnp.sum(values * n["loss_weights"]) for name, values in losses.items()}
    loss = losses["pg_loss"] - ENTROPY_COEFF * losses["entropy_loss"] + KL_COEF * losses["kl_loss"]
    return loss, (losses, (logprobs, entropy))


def value_loss(params):
    n = NUMBERS
    values = decoder.score(model("score"), params, plain_hidden(model("score"), params, "score"))[..., 0]
    clipped = jnp.clip(values, n["old_values"] - VALUE_CLIP, n["old_values"] + VALUE_CLIP)
    worst = jnp.maximum((values - n["returns"]) ** 2, (clipped - n["returns"]) ** 2)
    loss = 0.5 * jnp.sum(worst * n["loss_weights"])
    return loss, ({"vf_loss": loss}, (values,))


class Reference(NamedTuple):
    per_token: tuple[np.ndarray, ...]  # [B, T]: logprobs and entropies, or values
    losses: dict[str, np.ndarray]
    norm: float  # of the gradient
    gradient: dict  # clipped
    stepped: dict  # the parameters after one step of AdamW


@cache
def reference(head: str) -> Reference:
    params = load(make_mesh(1, 1, 1), head)
    loss = policy_loss if head == "lm" else value_loss
    gradient, (losses, per_token) = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda g: g * min(1.0, CLIP_GRAD / norm), gradient)
    stepped = jax.tree.map(
        lambda p, g: p - LR * (g / (abs(g) + EPS) + WEIGHT_DECAY * p), jax.device_get(params), gradient
    )
    return Reference(per_token, losses, norm, gradient, stepped)


def role(mesh, head: str, compression: Compression = NO_COMPRESSION):
    optimizer = make_optimizer(weight_decay=WEIGHT_DECAY, clip_grad=CLIP_GRAD, eps=EPS)
    if head == "score":
        critic = Critic(mesh, model("score"), optimizer, cliprange_value=VALUE_CLIP)
        return critic, targets_of(ValueTargets, layout(mesh))
    loss = PolicyLoss(
        clip_low=CLIP, clip_high=CLIP, clip_c=DUAL_CLIP, entropy_coeff=ENTROPY_COEFF, kl_loss_coef=KL_COEF
    )
    return Policy(mesh, model("lm"), optimizer, loss, compression), targets_of(PolicyTargets, layout(mesh))


def assert_trees_close(got, expected, *, rtol: float, atol: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("head", ["lm", "score"], ids=["actor", "critic"])
@pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "x".join(map(str, shape)))
def test_a_step_on_any_mesh_is_the_step_of_one_device_packed_and_padded(shape, head):
    expected = reference(head)
    mesh = make_mesh(*shape)
    programs, _ = role(mesh, head)
    for rows in packed_and_padded(mesh):
        state = init_state(programs.optimizer, {"params": load(mesh, head)})
        shardings = jax.tree.map(lambda x: x.sharding, state)
        state, metrics = programs.step(state, {}, rows, targets_of(programs.Targets, rows), LR)
        # Float32 rounding of sums in another order. Sizes: losses 1, gradients 0.1 (clipped to a norm of 1), steps 0.01.
        assert_trees_close(metrics["losses"], expected.losses, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], expected.norm, rtol=1e-5)
        moments = jax.device_get(jax.tree.map(lambda m: m / 0.1, state.opt_state.mu["params"]))
        assert_trees_close(moments, expected.gradient, rtol=1e-4, atol=1e-6)  # moments are (1 - beta1) x gradient
        assert_trees_close(state.trained["params"], expected.stepped, rtol=1e-6, atol=1e-6)
        # What was split stays split, the optimizer's moments like their parameters.
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
        assert all(jax.tree.leaves(same))


def test_logprobs_and_values_on_a_mesh_are_those_of_one_device():
    mesh, present = make_mesh(2, 2, 2), SEQUENCES.present
    logprobs, entropy, _ = role(mesh, "lm")[0].logprobs({"params": load(mesh, "lm")}, layout(mesh))
    values = role(mesh, "score")[0].values({"params": load(mesh, "score")}, layout(mesh))
    expected = [*reference("lm").per_token, *reference("score").per_token]
    for got, plain in zip((logprobs, entropy, values), expected, strict=True):
        np.testing.assert_allclose(got, np.where(present, plain, 0.0), atol=1e-5)


@pytest.mark.parametrize(
    "shape, q_proj, down_proj, table",
    [
        # [L, D, N, H] = [2, 32, 4, 16], [L, F, D] = [2, 40, 32], [V, D] = [80, 32]
        ((8, 1, 1), (2, 32, 4, 16), (2, 40, 32), (80, 32)),  # replicas
        ((1, 8, 1), (2, 4, 4, 16), (2, 40, 4), (80, 4)),  # the hidden size over fsdp
        ((1, 1, 2), (2, 32, 2, 16), (2, 20, 32), (40, 32)),  # heads, mlp and words over tensor
        ((2, 2, 2), (2, 16, 2, 16), (2, 20, 16), (40, 16)),
        ((1, 1, 8), (2, 32, 4, 16), (2, 5, 32), (10, 32)),  # 8 does not divide 4 heads: replicated
        ((1, 3, 1), (2, 32, 4, 16), (2, 40, 32), (80, 32)),  # 3 divides no 32
    ],
)
def test_every_device_holds_its_part_of_the_weights_and_no_more(shape, q_proj, down_proj, table):
    params = load(make_mesh(*shape), "lm")
    layers = params["layers"]
    held = {
        q_proj: layers["self_attn"]["q_proj"]["kernel"],
        down_proj: layers["mlp"]["down_proj"]["kernel"],
        table: params["embed_tokens"]["embedding"],
    }
    for expected, array in held.items():
        shards = array.addressable_shards
        assert len(shards) == np.prod(shape) and all(shard.data.shape == expected for shard in shards)


def test_a_dimension_that_does_not_divide_is_replicated_and_the_others_are_not():
    mesh = make_mesh(2, 2, 2)
    assert partition(mesh, ("embed", "heads", None), (32, 4, 16)) == PartitionSpec(("fsdp",), ("tensor",), None)
    assert partition(mesh, ("embed", "heads", None), (32, 3, 16)) == PartitionSpec(("fsdp",), None, None)
    assert partition(mesh, ("embed", "head_dim"), (31, 16)) == PartitionSpec(None, None)
    assert partition(mesh, ("rows", None), (4, 7)) == PartitionSpec(("data", "fsdp"), None)
    assert partition(mesh, ("rows", None), (2, 7)) == PartitionSpec(None, None)


def test_words_that_the_tensor_axis_does_not_divide_give_the_same_logprobs():
    random = np.random.default_rng(0)
    hidden, table = (random.normal(size=shape).astype(np.float32) for shape in ((2, 6, 8), (80, 8)))
    ids, columns = random.integers(0, 80, (2, 6)), np.broadcast_to(np.arange(6), (2, 6))

    def run(mesh):
        with use_mesh(mesh):
            return jax.jit(partial(target_logprobs, keep=(9, 0.8)))(hidden, table, columns, ids, jnp.int32(6))

    for one, split in zip(run(make_mesh(1, 1, 1)), run(make_mesh(1, 1, 3)), strict=True):
        np.testing.assert_allclose(split, one, atol=1e-5)


def test_the_axis_words_in_the_model_reach_the_compiler():
    config, mesh = model("lm"), make_mesh(2, 2, 2)
    variables, _ = decoder.abstract_params(config)
    rows = [jax.ShapeDtypeStruct((8, 20), jnp.int32)] * 4
    with use_mesh(mesh):
        program = str(jax.make_jaxpr(decoder.hidden_states, static_argnums=0)(config, variables, *rows))
    assert "sharding_constraint" in program and "('data', 'fsdp')" in program


def test_rows_are_split_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    assert num_row_shards(mesh) == 4
    rows = put_rows(mesh, np.arange(3 * 8 * 5).reshape(3, 8, 5), axis=1)
    assert {shard.data.shape for shard in rows.addressable_shards} == {(3, 2, 5)}
    np.testing.assert_array_equal(rows, np.arange(3 * 8 * 5).reshape(3, 8, 5))


def test_adapters_train_on_a_mesh_and_the_base_stays():
    mesh = make_mesh(2, 2, 2)
    programs, targets = role(mesh, "lm")
    config = dataclasses.replace(programs.config, lora_rank=2, lora_alpha=6.0, lora_targets=("q_proj", "down_proj"))
    policy = Policy(mesh, config, programs.optimizer, programs.loss)
    shapes, axes = decoder.abstract_params(config)
    random = np.random.default_rng(2)
    lora = jax.tree.map_with_path(
        lambda path, x: jax.device_put(np.float32(random.normal(size=x.shape) * (path[-1].key == "a")), x.sharding),
        with_shardings(mesh, shapes["lora"], axes["lora"]),
    )
    start, base = jax.device_get(lora), load(mesh, "lm")
    state = init_state(policy.optimizer, {"lora": lora})
    state, metrics = policy.step(state, {"params": base}, layout(mesh), targets, LR)

    # B is zero: the losses are the base's, A has no gradient, and that of B is scale A' dW, for y = x W + scale x A B.
    plain = reference("lm")
    assert_trees_close(metrics["losses"], plain.losses, rtol=1e-5, atol=1e-6)
    moments, scale = jax.device_get(state.opt_state.mu["lora"]["layers"]), 6.0 / 2
    expected = {}
    for block, name, equation in (("self_attn", "q_proj", "ldr,ldnh->lrnh"), ("mlp", "down_proj", "lfr,lfd->lrd")):
        dw = plain.gradient["layers"][block][name]["kernel"] * plain.norm / CLIP_GRAD  # not clipped
        expected[name] = scale * np.einsum(equation, start["layers"][block][name]["a"], dw)
    total = np.sqrt(sum(np.sum(g**2) for g in expected.values()))
    np.testing.assert_allclose(metrics["grad_norm"], total, rtol=1e-5)
    for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        np.testing.assert_allclose(moments[block][name]["b"] / 0.1, expected[name] / total, rtol=1e-4, atol=1e-6)
        assert not moments[block][name]["a"].any()

    assert_trees_close(base, load(mesh, "lm"), rtol=0, atol=0)
    q_proj = state.trained["lora"]["layers"]["self_attn"]["q_proj"]  # A [L, D, rank], B [L, rank, N, H]
    assert q_proj["a"].addressable_shards[0].data.shape == (2, 16, 2)
    assert q_proj["b"].addressable_shards[0].data.shape == (2, 2, 2, 16)


@pytest.mark.parametrize("sizes, shape", [((1, -1, 1), (1, 8, 1)), ((2, 2, -1), (2, 2, 2)), ((1, 1, 2), (1, 1, 2))])
def test_minus_one_takes_the_devices_that_are_left(sizes, shape):
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((-1, -1, 1), "mesh -1x-1x1: only one axis may be -1"),
        ((3, -1, 1), "mesh 3x-1x1: 3 does not divide the 8 devices"),
        ((4, 4, 1), "mesh 4x4x1 needs 16 devices and there are 8: set mesh.data, mesh.fsdp and mesh.tensor"),
        ((0, -1, 1), "mesh 0x-1x1: an axis counts devices"),
        ((1, -2, 1), "mesh 1x-2x1: an axis counts devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_in_words(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*sizes)


# Several slices of TPUs.


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip of a line of four, as jax describes them."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


CHIPS = [Chip(4 * slice_index + x, slice_index, (x, 0, 0)) for slice_index in (0, 1) for x in range(4)]


def test_between_slices_of_tpus_lie_replicas_alone():
    replicas = make_mesh(4, -1, 1, devices=CHIPS).devices
    assert replicas.shape == (4, 2, 1)
    assert [{chip.slice_index for chip in replica.flat} for replica in replicas] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize("shape", [(1, -1, 1), (1, 4, 2), (2, 3, 1)])
def test_a_mesh_that_would_cross_slices_otherwise_is_refused_in_words(shape):
    with pytest.raises(ValueError, match=r"is on 2 slices of TPUs of 4, [24] chips.* set mesh.data to a multiple of 2"):
        make_mesh(*shape, devices=CHIPS)
