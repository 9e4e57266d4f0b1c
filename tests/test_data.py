"""Rows become prompts as the model reads them, and a resumed run sees the prompts that the uninterrupted one sees."""

import json
import logging

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxrl.data import PromptDataset, PromptLoader, load_rows, tokenizer_of, truncate

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{% if message.name is defined %}({{ message.name }}){% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if style is defined %}{{ style }}{% endif %}"
)


def make_tokenizer(chat_template):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is the sum of these numbers?", "the answer is the number"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", chat_template=chat_template)


@pytest.fixture(scope="module")
def chat_tokenizer():
    return make_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def plain_tokenizer():
    return make_tokenizer(None)


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def verl_rows(count):
    return [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"split": "train", "index": i, "when": "2024-01-01"},
        }
        for i in range(count)
    ]


def plain_rows(count):
    return [{"question": f"What is {i} + 1?", "answer": i + 1, "level": "easy"} for i in range(count)]


@pytest.mark.parametrize("broken", ["tokenizer.json", "config.json"])
def test_a_tokenizer_that_cannot_be_read_is_said_in_one_line(chat_tokenizer, tmp_path, broken):
    with pytest.raises(ValueError, match="holds no tokenizer that can be read .*: fetch its tokenizer") as caught:
        tokenizer_of(tmp_path)
    assert "\n" not in str(caught.value)
    chat_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    assert tokenizer_of(tmp_path).chat_template == TEMPLATE
    (tmp_path / broken).write_text('{"model_type": "llama", "hidden_size": null}')
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer that can be read") as caught:
        tokenizer_of(tmp_path)
    assert "\n" not in str(caught.value)


# --- From a row to a prompt -------------------------------------------------------------------------------------------


def test_a_row_in_verls_schema_becomes_a_prompt(chat_tokenizer):
    prompt = PromptDataset(verl_rows(3), chat_tokenizer, max_prompt_length=64)[2]
    assert prompt.text == "<|user|>What is 2 + 1?<|end|><|assistant|>"
    assert chat_tokenizer.decode(prompt.token_ids) == prompt.text
    expected = chat_tokenizer.apply_chat_template(verl_rows(3)[2]["prompt"], add_generation_prompt=True)["input_ids"]
    assert prompt.token_ids == expected
    assert (prompt.data_source, prompt.ground_truth, prompt.index) == ("sums", "3", 2)
    assert prompt.extra_info == {"split": "train", "index": 2, "when": "2024-01-01"}
    assert prompt.messages == [{"role": "user", "content": "What is 2 + 1?"}]


def test_plain_columns_are_read_by_the_keys_of_the_config(chat_tokenizer):
    dataset = PromptDataset(
        plain_rows(3),
        chat_tokenizer,
        max_prompt_length=64,
        prompt_key="question",
        ground_truth_key="answer",
        data_source="my_sums",
    )
    assert dataset[1].text == "<|user|>What is 1 + 1?<|end|><|assistant|>"
    assert (dataset[1].data_source, dataset[1].ground_truth, dataset[1].extra_info) == ("my_sums", 2, {"level": "easy"})


def test_a_dot_in_a_key_goes_into_a_column_of_dicts(chat_tokenizer):
    rows = [{"task": {"text": "Hi", "truth": {"value": 3}}}]
    prompt = PromptDataset(
        rows,
        chat_tokenizer,
        max_prompt_length=64,
        prompt_key="task.text",
        ground_truth_key="task.truth.value",
    )[0]
    assert (prompt.messages, prompt.ground_truth) == ([{"role": "user", "content": "Hi"}], 3)


def test_all_sources_give_identical_prompts(tmp_path, chat_tokenizer):
    rows = verl_rows(7)
    rows[3]["prompt"] = [{"role": "system", "content": "Be brief", "name": "me"}, {"role": "user", "content": "Hi"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.py").write_text(f"def rows():\n    yield from {rows!r}\n")
    names = [tmp_path / "rows.parquet", tmp_path / "rows.json", tmp_path / "rows.jsonl", f"{tmp_path}/rows.py:rows"]
    sources = [rows, datasets.Dataset.from_list(rows), *names]
    made = [PromptDataset(load_rows(source), chat_tokenizer, max_prompt_length=64) for source in sources]
    assert made[0][3].text == "<|system|>Be brief(me)<|end|><|user|>Hi<|end|><|assistant|>"
    for dataset in made[1:]:
        assert list(dataset) == list(made[0])
        assert dataset.fingerprint == made[0].fingerprint


def test_a_text_is_read_as_it_is_when_there_is_no_chat_template_or_it_is_switched_off(chat_tokenizer, plain_tokenizer):
    keys = {"prompt_key": "question", "ground_truth_key": "answer", "max_prompt_length": 64}
    without = PromptDataset(plain_rows(1), plain_tokenizer, **keys)[0]
    switched_off = PromptDataset(plain_rows(1), chat_tokenizer, chat=False, **keys)[0]
    assert without == switched_off
    assert (without.text, without.messages) == ("What is 0 + 1?", None)
    assert without.token_ids == plain_tokenizer("What is 0 + 1?")["input_ids"]
    assert without.token_ids[0] == plain_tokenizer.bos_token_id


def test_the_system_prompt_and_the_template_arguments_reach_the_template(chat_tokenizer):
    rows = [{"prompt": "Hi"}, {"prompt": [{"role": "system", "content": "Own"}, {"role": "user", "content": "Ho"}]}]
    dataset = PromptDataset(
        rows,
        chat_tokenizer,
        max_prompt_length=64,
        system_prompt="Think",
        apply_chat_template_kwargs={"style": "!", "add_generation_prompt": False},
    )
    assert dataset[0].text == "<|system|>Think<|end|><|user|>Hi<|end|>!"
    assert dataset[1].text == "<|system|>Own<|end|><|user|>Ho<|end|>!"


def test_rows_without_ground_truth_are_counted_in_the_log(chat_tokenizer, caplog):
    rows = verl_rows(3)
    del rows[1]["reward_model"]
    dataset = PromptDataset(rows, chat_tokenizer, max_prompt_length=64)
    assert [prompt.ground_truth for prompt in dataset] == ["1", None, "3"]
    assert "1 of 3 rows have no ground truth" in caplog.text


# --- The length limit -------------------------------------------------------------------------------------------------


def long_rows():
    rows = verl_rows(4)
    rows[1]["prompt"][0]["content"] = "0123456789" * 3
    rows[3]["prompt"][0]["content"] = "0123456789" * 4
    return rows


def test_overlong_prompts_are_left_out_and_counted(chat_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    dataset = PromptDataset(
        long_rows(), chat_tokenizer, max_prompt_length=30, filter_overlong_prompts=True, name="train"
    )
    assert [prompt.index for prompt in dataset] == [0, 2]
    assert "train: 2 of 4 prompts are longer than data.max_prompt_length 30" in caplog.text
    assert "left out" in caplog.text
    # The limit itself is allowed.
    exact = len(PromptDataset(long_rows(), chat_tokenizer, max_prompt_length=99)[3].token_ids)
    assert len(PromptDataset(long_rows(), chat_tokenizer, max_prompt_length=exact)) == 4


def test_an_overlong_prompt_is_an_error_that_names_row_and_lengths(chat_tokenizer):
    with pytest.raises(
        ValueError,
        match=r"val: 2 of 4 prompts are longer than data.max_prompt_length 30 \(first row 1 with 33 tokens, "
        r"longest row 3 with 43\): raise it to 43, set data.filter_overlong_prompts",
    ):
        PromptDataset(long_rows(), chat_tokenizer, max_prompt_length=30, name="val")
    with pytest.raises(ValueError, match="no prompt is left"):
        PromptDataset(long_rows(), chat_tokenizer, max_prompt_length=3, filter_overlong_prompts=True)


@pytest.mark.parametrize(
    "side, kept", [("left", [4, 5, 6, 7, 8]), ("right", [0, 1, 2, 3, 4]), ("middle", [0, 1, 6, 7, 8])]
)
def test_truncation_keeps_the_part_it_says(side, kept):
    assert truncate(list(range(9)), 5, side) == kept
    assert truncate(list(range(5)), 5, side) == list(range(5))
    assert len(truncate(list(range(9)), 1, side)) == 1


def test_a_cut_prompt_has_the_text_of_its_tokens(chat_tokenizer, caplog):
    whole = PromptDataset(long_rows(), chat_tokenizer, max_prompt_length=99)
    cut = PromptDataset(long_rows(), chat_tokenizer, max_prompt_length=30, truncation="left")
    assert "they are cut (data.truncation: left)" in caplog.text
    assert cut[0] == whole[0]
    assert cut[1].token_ids == whole[1].token_ids[-30:]
    assert cut[1].text == chat_tokenizer.decode(cut[1].token_ids) and whole[1].text.endswith(cut[1].text)


# --- What is wrong with a dataset is said at the start ----------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, settings, sentence",
    [
        (
            plain_rows(2),
            {},
            "row 0 of train has no column 'prompt'; its columns are question, answer, level: set data.prompt_",
        ),
        (
            plain_rows(2),
            {"prompt_key": "question", "ground_truth_key": "gold"},
            "no column 'gold'; its columns are question, answer, level: set data.ground_truth_key to one of them",
        ),
        ([*verl_rows(2), {"prompt": None}], {}, "row 2 of train: prompt is None, but it must be a text or a list"),
        ([{"prompt": ["Hi"]}], {}, "must be a text or a list of messages with role and content"),
        ([{"prompt": []}], {}, "must be a text or a list of messages with role and content"),
        ([{"prompt": "Hi", "gold": None}], {"ground_truth_key": "gold"}, "row 0 of train has no value in gold"),
        ([{"prompt": "Hi", "extra_info": 3}], {}, "row 0 of train: extra_info is 3"),
        ([{"prompt": "Hi"}], {"truncation": "centre"}, "data.truncation is 'centre': it must be error, left, right"),
        ([{"prompt": "Hi"}], {"max_prompt_length": 0}, "data.max_prompt_length is 0"),
        ([{"prompt": "Hi"}], {"chat": "maybe"}, "data.chat is 'maybe': it must be auto, true or false"),
        ([{"prompt": "Hi"}], {"chat": "false", "system_prompt": "Think"}, "data.system_prompt is set"),
        (
            [{"prompt": [{"role": "judge", "content": ""}]}],
            {},
            "template refuses messages of the roles judge: no judges",
        ),
        (verl_rows(2), {"chat": False}, "holds chat messages, but the tokenizer is used without"),
    ],
)
def test_wrong_rows_and_settings_are_named(chat_tokenizer, rows, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PromptDataset(rows, chat_tokenizer, **{"max_prompt_length": 64, "name": "train", **settings})


def test_a_tokenizer_without_chat_template_refuses_what_needs_one(plain_tokenizer):
    with pytest.raises(
        ValueError, match="row 0 of the dataset holds chat messages, but the tokenizer has no chat template"
    ):
        PromptDataset(verl_rows(2), plain_tokenizer, max_prompt_length=64)
    with pytest.raises(ValueError, match="data.chat is true, but the tokenizer has no chat template"):
        PromptDataset(plain_rows(2), plain_tokenizer, max_prompt_length=64, prompt_key="question", chat=True)
    no_specials = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(plain_tokenizer.backend_tokenizer.model))
    with pytest.raises(ValueError, match="row 1 of the dataset has an empty prompt"):
        PromptDataset([{"prompt": "What"}, {"prompt": ""}], no_specials, max_prompt_length=64)


# --- The order of the prompts -----------------------------------------------------------------------------------------


def indices(batch):
    return [prompt.index for prompt in batch]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_resumed_loader_continues_exactly_from_any_position(chat_tokenizer, shuffle):
    dataset = PromptDataset(verl_rows(10), chat_tokenizer, max_prompt_length=64)
    settings = {"prompts_per_step": 3, "seed": 5, "shuffle": shuffle}
    uninterrupted = PromptLoader(dataset, **settings)
    steps = [(uninterrupted.state(), next(uninterrupted), uninterrupted.epoch) for _ in range(14)]
    assert steps[-1][2] >= 3  # more than three epochs
    for start in range(len(steps)):
        resumed = PromptLoader(dataset, **settings)
        resumed.restore(json.loads(json.dumps(steps[start][0])))
        for _, batch, epoch in steps[start:]:
            assert next(resumed) == batch
            assert resumed.epoch == epoch


def test_an_epoch_shows_every_prompt_once_and_the_next_in_another_order(chat_tokenizer):
    dataset = PromptDataset(verl_rows(12), chat_tokenizer, max_prompt_length=64)
    loader = PromptLoader(dataset, prompts_per_step=4, seed=1)
    assert loader.steps_per_epoch == 3
    epochs = [[i for _ in range(3) for i in indices(next(loader))] for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = PromptLoader(dataset, prompts_per_step=12, seed=2)
    assert indices(next(other)) != epochs[0]


def test_prompts_that_do_not_fill_a_last_batch_are_left_out(chat_tokenizer):
    dataset = PromptDataset(verl_rows(5), chat_tokenizer, max_prompt_length=64)
    loader = PromptLoader(dataset, prompts_per_step=2, seed=0, shuffle=False)
    assert loader.steps_per_epoch == 2
    assert [indices(next(loader)) for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_a_position_may_be_continued_with_another_number_of_prompts_a_step(chat_tokenizer):
    dataset = PromptDataset(verl_rows(12), chat_tokenizer, max_prompt_length=64)
    first = PromptLoader(dataset, prompts_per_step=4, seed=1)
    whole = indices(next(PromptLoader(dataset, prompts_per_step=12, seed=1)))
    next(first)
    second = PromptLoader(dataset, prompts_per_step=2, seed=1)
    second.restore(first.state())
    assert indices(next(second)) == whole[4:6]


def test_a_position_in_other_data_or_another_order_is_refused(chat_tokenizer):
    def loader(rows, **settings):
        dataset = PromptDataset(rows, chat_tokenizer, max_prompt_length=64, name="train")
        return PromptLoader(dataset, **{"prompts_per_step": 2, "seed": 1, **settings})

    state = loader(verl_rows(6)).state()
    changed = verl_rows(6)
    changed[4]["reward_model"]["ground_truth"] = "42"
    for other, sentence in [
        (loader(verl_rows(7)), "position in train does not fit: its number of prompts was 6 and is 7 now"),
        (loader(changed), "its content \\(a fingerprint of the rows\\) was"),
        (loader(verl_rows(6)[::-1]), "its content"),
        (loader(verl_rows(6), seed=2), "its seed \\(data.seed\\) was 1 and is 2 now"),
        (loader(verl_rows(6), shuffle=False), "its shuffling \\(data.shuffle\\) was 1 and is 0 now"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            other.restore(state)


def test_a_loader_that_cannot_fill_a_step_says_so(chat_tokenizer):
    dataset = PromptDataset(verl_rows(3), chat_tokenizer, max_prompt_length=64, name="train")
    with pytest.raises(ValueError, match="train has 3 prompts, fewer than the 4 of a step"):
        PromptLoader(dataset, prompts_per_step=4, seed=0)
    with pytest.raises(ValueError, match="0 prompts a step"):
        PromptLoader(dataset, prompts_per_step=0, seed=0)
    with pytest.raises(ValueError, match="data.seed is -1"):
        PromptLoader(dataset, prompts_per_step=2, seed=-1)
