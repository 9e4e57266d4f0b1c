"""`load_rows`: every kind of source gives the same rows, and every wrong one a sentence with the fix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from jaxrl.sources import load_rows
from jaxrl.tasks import TASKS

ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1), "when": "2024-01-01"} for i in range(5)]


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def as_list(rows):
    return [dict(rows[i]) for i in range(len(rows))]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_source_gives_the_same_rows(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "lines.json", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "rows.py").write_text(f"def generate():\n    yield from {ROWS!r}\n")
    sources = [
        ROWS,
        dataset,
        datasets.DatasetDict({"train": dataset}),
        str(tmp_path / "rows.parquet"),
        tmp_path / "saved",
        tmp_path / "rows.jsonl",
        tmp_path / "lines.json",
        tmp_path / "rows.json",
        f"{tmp_path}/rows.py:generate",
        lambda: iter(ROWS),
        lambda: ROWS,
    ]
    for source in sources:
        assert as_list(load_rows(source)) == ROWS, source


def test_several_files_are_read_one_after_the_other(tmp_path):
    datasets.Dataset.from_list(ROWS[:2]).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    datasets.Dataset.from_list(ROWS[2:]).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    assert as_list(load_rows(tmp_path)) == ROWS
    assert as_list(load_rows(sorted(str(path) for path in tmp_path.iterdir()))) == ROWS
    first, second = write_jsonl(tmp_path / "a.jsonl", ROWS[:2]), tmp_path / "b.json"
    second.write_text(json.dumps(ROWS[2:]))
    assert as_list(load_rows([first, second])) == ROWS


def test_a_parquet_file_that_was_written_again_is_read_again(tmp_path):
    path = tmp_path / "rows.parquet"
    for rows in (ROWS[:2], ROWS[2:]):
        datasets.Dataset.from_list(rows).to_parquet(path)
        assert as_list(load_rows(path)) == rows


def test_a_folder_gives_the_split_that_is_asked_for(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "test.jsonl", ROWS[3:])
    write_jsonl(tmp_path / "train_socratic.jsonl", ROWS)
    assert as_list(load_rows(tmp_path, split="train")) == ROWS[:3]
    assert as_list(load_rows(tmp_path, split="test")) == ROWS[3:]
    with pytest.raises(ValueError, match="holds the splits train, test: set the split"):
        load_rows(tmp_path)
    with pytest.raises(ValueError, match="no file of the split 'dev'.*it holds test.jsonl, train.jsonl"):
        load_rows(tmp_path, split="dev")


def test_a_folder_may_hold_its_splits_in_data_or_in_folders_of_their_own(tmp_path):
    for name in ("hub/data", "folders/train", "folders/test"):
        (tmp_path / name).mkdir(parents=True)
    write_jsonl(tmp_path / "hub/data/train-00000-of-00001.jsonl", ROWS)
    (tmp_path / "hub/dataset_infos.json").write_text("{}")
    write_jsonl(tmp_path / "folders/train/part.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "folders/test/part.jsonl", ROWS[3:])
    assert as_list(load_rows(tmp_path / "hub", split="train")) == ROWS
    assert as_list(load_rows(tmp_path / "folders", split="test")) == ROWS[3:]


def test_functions_and_tasks_get_their_kwargs_and_the_split(tmp_path):
    (tmp_path / "rows.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Sum:\n    a: int\n"
        "def sums(split, size):\n    for i in range(size):\n        yield {'question': f'{split} {Sum(i).a}'}\n"
    )
    rows = load_rows(f"{tmp_path}/rows.py:sums", split="test", kwargs={"size": 2})
    assert as_list(rows) == [{"question": "test 0"}, {"question": "test 1"}]
    rows = load_rows("task:arithmetic", split="test", kwargs={"size": 5, "seed": 3, "operators": "*"})
    assert rows == TASKS["arithmetic"]("test", 5, 3, operators="*")


def test_wrong_sources_in_memory_are_named():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    two = datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS) for split in ("train", "test")})
    for source, split, sentence in [
        ([], None, "the list is empty"),
        (datasets.Dataset.from_list(ROWS).select([]), None, "the Dataset is empty"),
        (["a", 1], None, "row 0 of the list is a str"),
        (stream, None, "cannot be read as a dataset.*not a streaming one"),
        (two, None, "has the splits train, test and no split was given"),
        (two, "dev", "has the splits train, test and there is no split 'dev'"),
        (3, None, "the int cannot be read as a dataset"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_rows(source, split=split)


def test_the_mark_that_windows_puts_before_utf_8_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": "é"}\n{"a": "b"}\n', encoding="utf-8-sig")
    assert load_rows(tmp_path / "rows.jsonl") == [{"a": "é"}, {"a": "b"}]


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a": \n')
    (tmp_path / "broken.json").write_text('[{"a": 1}')
    (tmp_path / "object.json").write_text('{\n "data": [{"a": 1}]\n}')
    (tmp_path / "broken.parquet").write_text("not parquet")
    (tmp_path / "rows.csv").write_text("a\n1\n")
    (tmp_path / "script.py").write_text("")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([{"other": 1}]).to_parquet(tmp_path / "other.parquet")
    for source, sentence in [
        (tmp_path / "none.parquet", "there is no file .*none.parquet"),
        ("gsm8k", "there is no file gsm8k: .*a Hub id \\(org/name\\)"),
        (tmp_path / "empty", "has no file that ends in .parquet, .jsonl, .json; it holds nothing"),
        (tmp_path / "empty.jsonl", "empty.jsonl is empty"),
        (tmp_path / "broken.jsonl", "line 2 of .*broken.jsonl is not valid json"),
        (
            tmp_path / "broken.json",
            "broken.json is not valid json .*: a file holds one row a line, or one list of rows",
        ),
        (tmp_path / "object.json", "line 1 of .*object.json is not valid json .*: a file holds one row a line, or one"),
        (tmp_path / "broken.parquet", "broken.parquet could not be read as parquet"),
        ([tmp_path / "rows.parquet", tmp_path / "other.parquet"], "could not be read as parquet"),
        (tmp_path / "rows.csv", "has the ending '.csv'"),
        (tmp_path / "script.py", "dataset scripts are not run: name the function"),
        ([tmp_path / "rows.parquet", tmp_path / "broken.json"], "parquet files cannot be mixed"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_rows(source)
    with pytest.raises(ValueError, match="takes no kwargs, but size were given"):
        load_rows(tmp_path / "rows.parquet", kwargs={"size": 3})


def test_wrong_functions_and_tasks_are_named(tmp_path):
    (tmp_path / "rows.py").write_text("def rows(size):\n    return size\n")
    (tmp_path / "broken.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('one\\ntwo')\n")
    (tmp_path / "syntax.py").write_text("def rows()\n    return []\n")
    for source, kwargs, sentence in [
        (f"{tmp_path}/none.py:rows", {}, "there is no file .*none.py"),
        (f"{tmp_path}/broken.py:rows", {}, "importing .*broken.py failed: ModuleNotFoundError"),
        (f"{tmp_path}/raises.py:rows", {}, r"failed: RuntimeError: one two \(raises.py, line 1\)"),
        (f"{tmp_path}/syntax.py:rows", {}, r"failed: SyntaxError: expected ':' \(syntax.py, line 1\)\.$"),
        (f"{tmp_path}/rows.py:row", {}, "has no function row; did you mean rows"),
        (f"{tmp_path}/rows.py:other", {}, "has no function other; its functions are: rows"),
        (f"{tmp_path}/rows.py:rows", {}, "missing a required argument: 'size'; its parameters are \\(size\\)"),
        (f"{tmp_path}/rows.py:rows", {"size": 3}, "returned int: it must return or yield rows"),
        ("task:sums", {"size": 3}, "there is no task 'sums': the built-in tasks are arithmetic"),
        ("task:arithmetic", {}, "needs a size"),
        ("task:arithmetic", {"size": 3, "digit": 2}, "unexpected keyword argument 'digit'; its parameters are"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_rows(source, kwargs=kwargs)


def test_an_unreachable_hub_is_said_in_one_sentence(tmp_path):
    code = (
        "from jaxrl.sources import load_rows\n"
        "try: load_rows('org/name:main', split='train')\nexcept ValueError as e: print(e)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert "no file or folder org/name, and as a dataset of the Hugging Face Hub it could not be read" in result.stdout
