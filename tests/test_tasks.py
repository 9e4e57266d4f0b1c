"""The built-in problems: right answers, the same for the same seed, and no problem of one split in the other."""

import re

import pytest

from jaxrl.tasks import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gives_the_asked_number_of_different_rows_in_verls_schema(name):
    rows = TASKS[name]("train", 50, 0)
    assert len({row["prompt"][0]["content"] for row in rows}) == 50
    for index, row in enumerate(rows):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        assert row["data_source"] == name
        assert row["reward_model"]["style"] == "rule" and isinstance(row["reward_model"]["ground_truth"], str)
        assert row["extra_info"]["split"] == "train" and row["extra_info"]["index"] == index


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_function_of_its_seed(name):
    assert TASKS[name]("train", 40, 7) == TASKS[name]("train", 40, 7)
    assert TASKS[name]("train", 40, 7) != TASKS[name]("train", 40, 8)


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("arithmetic", {}),
        ("arithmetic", {"operators": "+-*", "num_terms": 3}),
        ("largest_number", {"digits": 1}),
        ("sort_numbers", {}),
        ("last_letter", {}),
        ("count_letters", {}),
    ],
)
def test_no_problem_is_in_both_splits_whatever_the_seeds(name, kwargs):
    def problems(split, size, seed):
        """Problems up to the order of their numbers or words, which is stricter than the text."""
        contents = (row["prompt"][0]["content"] for row in TASKS[name](split, size, seed, **kwargs))
        if kwargs.get("num_terms") == 3:
            return set(contents)
        return {tuple(sorted(re.findall(r"\w+|[-+*]", content))) for content in contents}

    train = problems("train", 60, 0) | problems("train", 50, 1)
    test = problems("test", 15, 2) | problems("test", 10, 0)
    assert train.isdisjoint(test)


def test_arithmetic_answers_are_those_of_python():
    for row in TASKS["arithmetic"]("train", 300, 0, operators="+-*", num_terms=4, digits=2, template="{expression}"):
        assert row["reward_model"]["ground_truth"] == str(eval(row["prompt"][0]["content"]))


def test_number_and_letter_answers_follow_from_the_question():
    for row in TASKS["largest_number"]("test", 50, 0, count=4, template="{numbers}"):
        numbers = [int(number) for number in row["prompt"][0]["content"].split(", ")]
        assert len(set(numbers)) == 4 and row["reward_model"]["ground_truth"] == str(max(numbers))
    for row in TASKS["sort_numbers"]("test", 20, 0, template="{numbers}"):
        numbers = [int(number) for number in row["prompt"][0]["content"].split(", ")]
        assert [int(number) for number in row["reward_model"]["ground_truth"].split(", ")] == sorted(numbers)
    for row in TASKS["last_letter"]("test", 20, 0, num_words=3, template="{words}"):
        words = row["prompt"][0]["content"].split()
        assert row["reward_model"]["ground_truth"] == words[0][-1] + words[1][-1] + words[2][-1]
    for row in TASKS["count_letters"]("test", 20, 0, template="{word} {letter}"):
        word, letter = row["prompt"][0]["content"].split()
        assert row["reward_model"]["ground_truth"] == str(word.count(letter)) != "0"


def test_train_and_test_together_are_all_one_digit_sums():
    def count(split):
        with pytest.raises(ValueError, match=f"only .* different {split} problems") as error:
            TASKS["arithmetic"](split, 101, 0)
        return int(re.findall(r"only (\d+)", str(error.value))[0])

    assert count("train") + count("test") == 100
    assert len(TASKS["arithmetic"]("train", count("train"), 0)) == count("train")


@pytest.mark.parametrize(
    "name, split, size, kwargs, sentence",
    [
        ("arithmetic", "validation", 10, {}, "split 'validation' must be train or test"),
        ("arithmetic", "train", 0, {}, "size 0 must be 1 or more"),
        ("arithmetic", "train", 10, {"operators": "/"}, "operators '/' must be of"),
        ("arithmetic", "train", 10, {"digits": 9, "num_terms": 4}, "lower the numbers"),
        ("arithmetic", "train", 10, {"template": "{sum}?"}, "cannot fill the template.*sum"),
        ("largest_number", "train", 10, {"count": 11, "digits": 1}, "count 11 must be between"),
        ("last_letter", "train", 10, {"num_words": 0}, "num_words must be between"),
    ],
)
def test_wrong_settings_of_a_task_are_named(name, split, size, kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        TASKS[name](split, size, 0, **kwargs)
