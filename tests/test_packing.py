"""Packing: where every token goes, how many rows that takes, and that none of it can be seen in a result."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.batch import PolicyTargets, Prompt, Rollout
from jaxrl.models import decoder
from jaxrl.models.config import ModelConfig
from jaxrl.optimizer import make_optimizer
from jaxrl.packing import Sequences, max_micro_batches, pack
from jaxrl.parallel import make_mesh
from jaxrl.update import Policy, PolicyLoss, TrainState
from jaxrl.weights.load import load_hf_config, load_params

QWEN3 = Path(__file__).parent / "data" / "hf_torch" / "qwen3"
T_RESPONSE = 8
VOCAB = 80  # of the fixture


def make_sequences(prompt_lengths, response_lengths, group, seed=0) -> Sequences:
    """Random tokens; one token in eight of the responses is not the model's own."""
    random = np.random.default_rng(seed)
    draw = lambda length: random.integers(1, VOCAB, length).astype(np.int32)  # noqa: E731
    prompts = [Prompt(draw(n).tolist(), "", "test", None, {}, None, index) for index, n in enumerate(prompt_lengths)]
    rollouts = [
        Rollout(int(g), draw(n), np.zeros(n, np.float32), True, 0, random.random(n) > 0.125)
        for g, n in zip(group, response_lengths, strict=True)
    ]
    return Sequences.of(prompts, rollouts, T_RESPONSE)


def random_sequences(random: np.random.Generator, longest: int) -> Sequences:
    """Groups of random sizes; no sequence is longer than `longest`, and some are as long."""
    num_prompts = int(random.integers(1, 6))
    group = np.sort(random.integers(0, num_prompts, random.integers(1, 13)))
    prompt_lengths = random.integers(1, longest, num_prompts)
    room = np.minimum(longest - prompt_lengths, T_RESPONSE)
    lengths = [int(room[g]) if random.random() < 0.5 else int(random.integers(0, room[g] + 1)) for g in group]
    return make_sequences(prompt_lengths, lengths, group)


def len_of(sequences: Sequences, b: int) -> int:
    """Tokens of a sequence, prompt and response."""
    return len(sequences.prompts[sequences.group[b]]) + int(sequences.lengths[b])


def test_rows_hold_each_prompt_once_and_its_responses_behind_it():
    sequences = make_sequences([3, 2], [2, 1, 2], [0, 0, 1])
    layout = pack(sequences, range(3), row_length=12, rows_per_micro_batch=1, max_micro_batches=2)
    (first, second), (a, b, c) = sequences.prompts, (sequences.tokens[i, :n] for i, n in enumerate([2, 1, 2]))
    rows = jax.tree.map(lambda x: x[0, 0].tolist(), layout.rows)
    assert rows.tokens == [*first, *a, *b, *second, *c, 0, 0]
    assert rows.positions == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 0, 0]
    assert rows.segments == [1, 1, 1, 2, 2, 3, 4, 4, 4, 4, 0, 0]
    assert rows.prefixes == [1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 0, 0]
    assert rows.target_ids == [*a, *b, *c, *[0] * 7]
    assert rows.target_columns[:5] == [2, 3, 2, 7, 8]  # both answers to the first prompt are predicted from its end
    assert rows.target_sequences == [0, 0, 1, 2, 2, *[3] * 7]
    assert layout.num_micro_batches == 1 and layout.num_slots.tolist() == [5, 0]


def test_unshared_rows_repeat_the_prompt_and_need_no_prefixes():
    sequences = make_sequences([3], [2, 1], [0, 0])
    layout = pack(sequences, range(2), row_length=12, rows_per_micro_batch=1, max_micro_batches=1, share_prompt=False)
    prompt, rows = sequences.prompts[0], jax.tree.map(lambda x: x[0, 0].tolist(), layout.rows)
    assert rows.tokens == [*prompt, *sequences.tokens[0, :2], *prompt, sequences.tokens[1, 0], 0, 0, 0]
    assert rows.segments == rows.prefixes == [1] * 5 + [2] * 4 + [0] * 3


def test_a_group_that_outgrows_a_row_is_cut_and_its_prompt_repeated():
    sequences = make_sequences([3], [4, 4, 4], [0, 0, 0])
    layout = pack(sequences, range(3), row_length=11, rows_per_micro_batch=2, max_micro_batches=1)
    assert (layout.rows.segments > 0).sum(axis=-1).tolist() == [[11, 7]]
    assert layout.rows.tokens[0, :, :3].tolist() == [sequences.prompts[0]] * 2


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_every_chosen_token_has_one_slot_and_the_column_before_it_in_its_sequence(share_prompt, ways):
    random = np.random.default_rng(1)
    for _ in range(40):
        sequences = random_sequences(random, longest=10)
        B = len(sequences.tokens)
        chosen = random.permutation(B)[: random.integers(1, B + 1)]
        layout = pack(
            sequences, chosen, row_length=20, rows_per_micro_batch=4, max_micro_batches=B, ways=ways,
            share_prompt=share_prompt,
        )  # fmt: skip
        rows, slot = layout.rows, layout.slot
        in_it = sequences.present & np.isin(np.arange(B), chosen)[:, None]
        np.testing.assert_array_equal(slot >= 0, in_it)
        used = slot[in_it]
        assert len(np.unique(used)) == len(used)
        np.testing.assert_array_equal(rows.target_ids.reshape(-1)[used], sequences.tokens[in_it])
        np.testing.assert_array_equal(rows.target_mask.reshape(-1)[used], sequences.mask[in_it])
        np.testing.assert_array_equal(rows.target_sequences.reshape(-1)[used], np.nonzero(in_it)[0])
        assert rows.target_mask.sum() == sequences.mask[in_it].sum()  # and true nowhere else
        assert (rows.target_sequences < B).sum() == len(used)
        # The state that predicts a token stands one place before it in its own sequence: its prompt, then its response.
        part, at = used // (4 // ways * 20), rows.target_columns.reshape(-1)[used]
        row, column = part * (4 // ways) + at // 20, at % 20
        seen = [
            (position, token)
            for b in sorted(chosen)
            for position, token in enumerate([*sequences.prompts[sequences.group[b]], *sequences.tokens[b]])
            if len(sequences.prompts[sequences.group[b]]) <= position + 1 < len_of(sequences, b)
        ]
        found = zip(rows.positions.reshape(-1, 20)[row, column], rows.tokens.reshape(-1, 20)[row, column], strict=True)
        assert list(found) == seen
        for m in range(layout.num_micro_batches):
            assert layout.num_slots[m] == (rows.target_sequences[m] < B).sum(axis=-1).max()
            assert (np.diff((rows.target_sequences[m] == B).astype(int)) >= 0).all()  # dense: the empty ones at the end
        assert not rows.segments[layout.num_micro_batches :].any()


def test_slots_and_sequences_round_trip():
    random = np.random.default_rng(2)
    sequences = make_sequences([3, 5, 2], [8, 1, 0, 4, 5], [0, 0, 1, 1, 2])
    layout = pack(sequences, [0, 1, 2, 4], row_length=16, rows_per_micro_batch=4, max_micro_batches=3, ways=2)
    values = random.normal(size=sequences.tokens.shape).astype(np.float32)
    kept = sequences.present & (np.arange(5) != 3)[:, None]
    slots = layout.to_slots(values)
    assert slots.shape == layout.rows.target_ids.shape == (3, 2, 32)
    assert np.count_nonzero(slots) == kept.sum()
    np.testing.assert_array_equal(layout.from_slots(slots), np.where(kept, values, 0.0))
    np.testing.assert_array_equal(layout.to_slots(sequences.mask), layout.rows.target_mask)  # dtypes are kept


@pytest.mark.parametrize("share_prompt", [True, False])
def test_best_fit_leaves_no_two_rows_that_could_be_one(share_prompt):
    random = np.random.default_rng(3)
    for _ in range(40):
        sequences = random_sequences(random, longest=12)
        B = len(sequences.tokens)
        sizes = dict(row_length=24, rows_per_micro_batch=B, max_micro_batches=1, share_prompt=share_prompt)
        layout = pack(sequences, range(B), **sizes)
        lengths = np.sort((layout.rows.segments > 0).sum(axis=-1)[0])
        lengths = lengths[lengths > 0]
        assert len(lengths) < 2 or lengths[0] + lengths[1] > 24
        again = pack(sequences, range(B), **sizes)
        assert all(np.array_equal(a, b) for a, b in zip(layout.rows, again.rows, strict=True))


@pytest.mark.parametrize("share_prompt", [True, False])
def test_any_sequences_fit_into_max_micro_batches(share_prompt):
    random = np.random.default_rng(4)
    for _ in range(200):
        row_length, rows = int(random.integers(8, 41)), int(random.integers(1, 4))
        longest = int(random.integers(2, row_length + 1))
        sequences = random_sequences(random, longest)
        B = len(sequences.tokens)
        most = max_micro_batches(B, longest, row_length, rows)
        layout = pack(
            sequences, range(B), row_length=row_length, rows_per_micro_batch=rows, max_micro_batches=most,
            share_prompt=share_prompt,
        )  # fmt: skip
        assert 1 <= layout.num_micro_batches <= most


def test_groups_just_over_half_a_row_are_taken_apart_rather_than_given_a_row_each():
    # As groups: 1 + 3 + 3 = 7 of 12 tokens, six rows. As sequences of 1 + 3: three a row, four rows, the bound.
    sequences = make_sequences([1] * 6, [3] * 12, np.repeat(np.arange(6), 2))
    most = max_micro_batches(12, 4, 12, 1)
    layout = pack(sequences, range(12), row_length=12, rows_per_micro_batch=1, max_micro_batches=most)
    assert layout.num_micro_batches == most == 4


def test_sharing_saves_rows_where_prompts_are_long():
    sequences = make_sequences([12], [2] * 4, [0] * 4)
    shared, unshared = (
        pack(sequences, range(4), row_length=20, rows_per_micro_batch=1, max_micro_batches=4, share_prompt=share)
        for share in (True, False)
    )
    assert (shared.num_micro_batches, unshared.num_micro_batches) == (1, 4)


def test_a_sequence_longer_than_a_row_is_refused_with_the_setting_that_helps():
    sequences = make_sequences([6], [5], [0])
    with pytest.raises(ValueError, match="6 prompt and 5 response .* row of 10 tokens: raise trainer.row_length"):
        pack(sequences, [0], row_length=10, rows_per_micro_batch=1, max_micro_batches=1)


def test_more_rows_than_the_program_was_compiled_for_are_refused():
    sequences = make_sequences([6, 6], [4, 4], [0, 1])
    with pytest.raises(ValueError, match="2 packed rows of 10 tokens need 2 micro-batches of 1 rows.*at most 1"):
        pack(sequences, [0, 1], row_length=10, rows_per_micro_batch=1, max_micro_batches=1)


# From here on: a model gives the same numbers, whatever the rows look like.

SEQUENCES = make_sequences([5, 3, 7, 4], [8, 3, 6, 5, 8, 1, 4, 7], np.repeat(np.arange(4), 2), seed=5)
B = len(SEQUENCES.tokens)
TWO_ROWS = dict(row_length=30, rows_per_micro_batch=2, max_micro_batches=4)
LAYOUTS = {
    "each sequence with its prompt, two micro-batches": TWO_ROWS | dict(share_prompt=False),
    "prompts shared, two micro-batches": TWO_ROWS,
    "prompts shared, one micro-batch": dict(row_length=30, rows_per_micro_batch=4, max_micro_batches=1),
    "prompts shared, one micro-batch in two parts": dict(
        row_length=30, rows_per_micro_batch=4, max_micro_batches=1, ways=2
    ),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Without LLVM's passes, which take half the time of compiling. What XLA does to a program stays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def policy():
    optimizer = make_optimizer(clip_grad=None, weight_decay=0.0)
    loss = PolicyLoss(entropy_coeff=0.01, kl_loss_coef=0.1, temperature=0.8)
    return Policy(make_mesh(1, 1, 1), ModelConfig.from_hf(load_hf_config(QWEN3)), optimizer, loss)


@pytest.fixture(scope="module")
def params(policy):
    return load_params(QWEN3, policy.config, decoder.abstract_params(policy.config)[0]["params"])


hidden_states = jax.jit(decoder.hidden_states, static_argnums=0)


def results(policy: Policy, params, layout):
    """What the targets of a layout get, as [B, T, ...], and what one step on it computes."""
    logprobs, entropy, _ = policy.logprobs({"params": params}, layout)
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), layout.rows)
    hidden = hidden_states(policy.config, {"params": params}, rows.tokens, rows.positions, rows.segments, rows.prefixes)
    parts = np.asarray(hidden).reshape(len(rows.target_columns), -1, hidden.shape[-1])
    at_targets = np.take_along_axis(parts, rows.target_columns[..., None], axis=1)
    per_token = [layout.from_slots(x.reshape(layout.rows.target_ids.shape)) for x in np.moveaxis(at_targets, -1, 0)]
    state = jax.tree.map(jnp.copy, TrainState({"params": params}, policy.optimizer.init({"params": params})))
    targets = PolicyTargets(*map(layout.to_slots, target_columns()))
    state, metrics = policy.step(state, {}, layout, targets, 1e-3)
    return {
        "logprobs": logprobs,
        "entropy": entropy,
        "hidden states": np.stack(per_token, axis=-1),
        "gradients": jax.device_get(state.opt_state.mu),  # Adam's first moment after one step is 0.1 x the gradient
        "losses": jax.device_get(metrics["losses"]),
        "metrics": jax.device_get(metrics["sums"]),
    }


def target_columns() -> tuple[np.ndarray, ...]:
    """The fields of `PolicyTargets` as [B, T], with a weight of the whole mini-batch on each token."""
    random = np.random.default_rng(6)
    noise = [0.3 * random.normal(size=SEQUENCES.tokens.shape).astype(np.float32) for _ in range(4)]
    mask = SEQUENCES.mask.astype(np.float32)
    return noise[0] - 4, 5 * noise[1], noise[2] - 4, 1 + noise[3], *2 * (mask / mask.sum(),)


@pytest.fixture(scope="module")
def one_by_one(policy, params):
    """Every sequence alone in a row, its results added to the others': no packing, no sharing, no micro-batches."""
    alone = [results(policy, params, pack(SEQUENCES, [b], **TWO_ROWS)) for b in range(B)]
    return jax.tree.map(lambda *xs: sum(xs), *alone)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_result_depends_on_the_layout(policy, params, one_by_one, name):
    layout = pack(SEQUENCES, range(B), **LAYOUTS[name])
    assert layout.num_micro_batches == (1 if "one" in name else 2)
    assert layout.rows.segments.max() > 1 and (layout.rows.segments != layout.rows.prefixes).any() == ("shared" in name)
    got = results(policy, params, layout)
    # Sums in another order: float32 rounding of numbers up to 10 and, for gradients, up to 0.06.
    for key, atol in {**dict.fromkeys(got, 5e-6), "gradients": 1e-7}.items():
        for (path, a), b in zip(jax.tree.leaves_with_path(got[key]), jax.tree.leaves(one_by_one[key]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=f"{key} {jax.tree_util.keystr(path)}")


def test_logprobs_are_those_of_the_plain_formula(policy, params, one_by_one):
    head = decoder.head_table(policy.config, params)
    hidden = one_by_one["hidden states"].astype(np.float64)
    logits = hidden @ np.asarray(head, np.float64).T / policy.loss.temperature
    logits -= logits.max(axis=-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(logp, SEQUENCES.tokens[..., None], axis=-1)[..., 0]
    entropy = -(np.exp(logp) * logp).sum(axis=-1)
    present = SEQUENCES.present
    np.testing.assert_allclose(one_by_one["logprobs"], np.where(present, expected, 0.0), atol=1e-5)
    np.testing.assert_allclose(one_by_one["entropy"], np.where(present, entropy, 0.0), atol=1e-5)
