"""`scripts/prepare_data.py` writes parquet in verl's schema, and `jaxrl.data` reads it back."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from jaxrl.sources import load_rows

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"
GSM8K = [
    {"question": "Ann has 3 apples and buys 4.", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A house costs 1,000 and one more 250.", "answer": "1,000 + 250 = 1,250\n#### 1,250"},
    {"question": "Tom owes 5.", "answer": "0 - 5 = -5\n#### -5"},
]


@pytest.fixture(scope="module")
def prepare_data():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split, rows in {"train": GSM8K, "test": GSM8K[:1]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def test_gsm8k_is_written_in_verls_schema(prepare_data, source, tmp_path, capsys):
    prepare_data.main(["gsm8k", "--source", str(source), "--out", str(tmp_path / "out")])
    train, test = read(tmp_path / "out/train.parquet"), read(tmp_path / "out/test.parquet")
    assert "train.parquet: 3 rows" in capsys.readouterr().out
    assert [row["reward_model"]["ground_truth"] for row in train] == ["7", "1250", "-5"]
    instruction = 'Let\'s think step by step and output the final answer after "####".'
    assert test == [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"Ann has 3 apples and buys 4. {instruction}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "extra_info": {"split": "test", "index": 0, **GSM8K[0]},
        }
    ]


def test_gsm8k_from_parquet_equals_gsm8k_from_jsonl(prepare_data, source, tmp_path):
    parquet = tmp_path / "parquet/main"
    parquet.mkdir(parents=True)
    for split, rows in {"train": GSM8K, "test": GSM8K[:1]}.items():
        datasets.Dataset.from_list(rows).to_parquet(parquet / f"{split}-00000-of-00001.parquet")
    prepare_data.main(["gsm8k", "--source", str(source), "--out", str(tmp_path / "a")])
    prepare_data.main(["gsm8k", "--source", str(parquet), "--out", str(tmp_path / "b")])
    for name in ("train.parquet", "test.parquet"):
        assert read(tmp_path / "a" / name) == read(tmp_path / "b" / name)


def test_what_is_written_is_what_is_loaded(prepare_data, source, tmp_path):
    prepare_data.main(["gsm8k", "--source", str(source), "--out", str(tmp_path / "out")])
    for split in ("train", "test"):
        rows = load_rows(tmp_path / "out", split=split)
        assert [rows[i] for i in range(len(rows))] == read(tmp_path / f"out/{split}.parquet")


def test_files_that_exist_are_kept_unless_overwriting_is_asked_for(prepare_data, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "test.parquet").write_text("precious")
    arguments = ["gsm8k", "--source", str(source), "--out", str(out)]
    with pytest.raises(ValueError, match="test.parquet exist already: give --overwrite"):
        prepare_data.main(arguments)
    assert (out / "test.parquet").read_text() == "precious" and len(list(out.iterdir())) == 1
    prepare_data.main([*arguments, "--overwrite"])
    assert len(read(out / "test.parquet")) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "test.parquet",
        "train.parquet",
    ]  # nothing unfinished is left


def test_wrong_gsm8k_files_are_named(prepare_data, source, tmp_path):
    arguments = ["gsm8k", "--source", str(source), "--out", str(tmp_path / "out")]
    (source / "test.jsonl").write_text('{"question": "?", "answer": "7"}\n')
    with pytest.raises(ValueError, match='row 0 of the test split of .* has no number after "####"'):
        prepare_data.main(arguments)
    (source / "test.jsonl").write_text('{"problem": "?"}\n')
    with pytest.raises(ValueError, match="has the columns problem: GSM8K has question and answer"):
        prepare_data.main(arguments)
    (source / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="has no file of the split 'test'"):
        prepare_data.main(arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(prepare_data, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"--out .*file/out cannot be written \(.*\): name a folder that you may write"
    ):
        prepare_data.main(["gsm8k", "--source", str(source), "--out", str(tmp_path / "file" / "out")])


def test_reasoning_gym_splits_share_no_question_and_scores_its_own_answers(prepare_data, tmp_path):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    sizes = [
        "--train-size",
        "40",
        "--test-size",
        "10",
        "--set",
        "chain_sum.max_terms=2",
        "--set",
        "chain_sum.max_digits=1",
    ]
    prepare_data.main(["reasoning_gym", "chain_sum", "leg_counting", *sizes, "--out", str(tmp_path)])
    train, test = read(tmp_path / "train.parquet"), read(tmp_path / "test.parquet")
    assert (len(train), len(test)) == (80, 20)
    assert {row["data_source"] for row in test} == {"reasoning_gym/chain_sum", "reasoning_gym/leg_counting"}
    questions = [row["extra_info"]["question"] for row in train + test]
    assert len(set(questions)) == 100
    for row in test:
        entry = {**row["extra_info"], "metadata": json.loads(row["extra_info"]["metadata"])}
        score = reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
        assert score(row["reward_model"]["ground_truth"], entry) == 1.0


def test_the_test_problems_do_not_change_with_the_number_of_training_problems(prepare_data, tmp_path):
    pytest.importorskip("reasoning_gym")
    for size in ("10", "30"):
        arguments = [
            "reasoning_gym",
            "chain_sum",
            "--train-size",
            size,
            "--test-size",
            "10",
            "--out",
            str(tmp_path / size),
        ]
        prepare_data.main(arguments)
    assert read(tmp_path / "10/test.parquet") == read(tmp_path / "30/test.parquet")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["chain_sums"], "no data set 'chain_sums', did you mean chain_sum"),
        (["chain_sum", "--set", "leg_counting.a=1"], "--set names leg_counting, but the data sets are chain_sum"),
        (["chain_sum", "--set", "chain_sum.max=1"], "refuses the settings {'max': 1} of chain_sum"),
        (["chain_sum", "--set", "chain_sum.max_terms=1"], "max_terms must be >= min_terms"),
        (["chain_sum", "--set", "chain_sum.seed=1"], "refuses the settings {'seed': 1}"),
        (
            ["chain_sum", "--set", "chain_sum.max_terms=2", "--set", "chain_sum.max_digits=1"],
            "gave only 200 different questions in 22000 draws, but 1100 are asked for",
        ),
    ],
)
def test_wrong_reasoning_gym_settings_are_named(prepare_data, tmp_path, arguments, sentence):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=sentence):
        prepare_data.main(["reasoning_gym", *arguments, "--out", str(tmp_path)])


def test_the_command_line_helps_and_ends_with_one_sentence(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(SCRIPT), *arguments]
        environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "PATH": ""}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert "examples:" in run("--help").stdout
    wrong = run("gsm8k", "--source", str(tmp_path), "--out", str(tmp_path / "out"))
    assert wrong.returncode == 1 and wrong.stderr.startswith("prepare_data.py: ") and wrong.stderr.count("\n") == 1
    assert "is not of the form <data set>.<key>=<value>" in run("reasoning_gym", "chain_sum", "--set", "a=1").stderr
