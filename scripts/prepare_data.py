"""Writes train.parquet and test.parquet in verl's schema, for `data.train_files` and `data.val_files` of a config.

A row has `data_source`, `prompt` (chat messages), `ability`, `reward_model` (`style`, `ground_truth`) and `extra_info`
(`split`, `index`, `question`, `answer`).
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrl.sources import load_rows
from jaxrl.tasks import verl_row

# verl's words. Its GSM8K reward looks for the number after "####".
GSM8K_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'

EXAMPLES = """examples:
  python scripts/prepare_data.py gsm8k
      from the Hugging Face Hub into data/gsm8k/
  python scripts/prepare_data.py gsm8k --source ~/grade-school-math/grade_school_math/data --out data/gsm8k
      from a folder that holds train.jsonl and test.jsonl (or parquet) with the columns question and answer
  python scripts/prepare_data.py reasoning_gym chain_sum leg_counting --train-size 2000 --test-size 200 \\
      --set chain_sum.max_terms=3 --set chain_sum.max_digits=2
      two procedural data sets, 2000 + 200 problems of each (needs `pip install reasoning-gym`)
"""


def gsm8k(source: str, instruction: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split. `source` is a Hub id, or a folder with a train and a test file."""
    return {split: list(_gsm8k_split(source, split, instruction)) for split in ("train", "test")}


def _gsm8k_split(source: str, split: str, instruction: str) -> Iterator[dict[str, Any]]:
    rows = load_rows(source, split=split)
    for index in range(len(rows)):
        row = rows[index]
        if not {"question", "answer"} <= row.keys():
            raise ValueError(f"{source} has the columns {', '.join(row)}: GSM8K has question and answer")
        solution = re.search(r"#### *(-?[0-9.,]+)", row["answer"])
        if solution is None:
            raise ValueError(f'row {index} of the {split} split of {source} has no number after "####" in its answer')
        yield verl_row(
            data_source="openai/gsm8k",
            content=_join(row["question"], instruction),
            ground_truth=solution[1].replace(",", ""),
            ability="math",
            split=split,
            index=index,
            question=row["question"],
            answer=row["answer"],
        )


def reasoning_gym(
    names: list[str], settings: dict[str, dict[str, Any]], train_size: int, test_size: int, seed: int, instruction: str
) -> dict[str, list[dict[str, Any]]]:
    """`train_size` and `test_size` problems of each named data set, no question twice.

    `extra_info.metadata` is the problem's metadata as json: with `question` and `answer` it is the entry that
    `reasoning_gym.get_score_answer_fn(name)` scores an answer against.
    """
    if unknown := settings.keys() - set(names):
        raise ValueError(f"--set names {', '.join(sorted(unknown))}, but the data sets are {', '.join(names)}")
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for name in dict.fromkeys(names):
        entries = _distinct_entries(name, settings.get(name, {}), test_size + train_size, seed)
        # The test problems come first, so that they stay the same for every number of training problems.
        for number, (category, entry) in enumerate(entries):
            split = "test" if number < test_size else "train"
            rows[split].append(
                verl_row(
                    data_source=f"reasoning_gym/{name}",
                    content=_join(entry["question"], instruction),
                    ground_truth=str(entry["answer"]),
                    ability=category,
                    split=split,
                    index=len(rows[split]),
                    question=entry["question"],
                    answer=str(entry["answer"]),
                    metadata=json.dumps(entry["metadata"], default=str),
                )
            )
    return rows


def _distinct_entries(
    name: str, settings: dict[str, Any], size: int, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`size` entries with different questions, each with the category of its data set.

    All come from one seed: reasoning-gym seeds problem i with `seed + i`, so two neighbouring seeds, one for each split,
    would give nearly the same problems.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"reasoning_gym needs the package reasoning-gym: pip install reasoning-gym ({error})"
        ) from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f", did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(DATASETS))}"
        raise ValueError(f"reasoning_gym has no data set {name!r}{hint}")
    num_draws = 20 * size
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=num_draws, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning_gym refuses the settings {settings} of {name}: {error}") from error
    questions: set[str] = set()
    for index in range(num_draws):
        entry = dataset[index]
        if entry["question"] not in questions:
            questions.add(entry["question"])
            yield dataset.category, entry
        if len(questions) == size:
            return
    raise ValueError(
        f"{name} gave only {len(questions)} different questions in {num_draws} draws, but {size} are asked for: lower "
        f"--train-size or --test-size, or widen the data set with --set {name}.<key>=<value>"
    )


def write(splits: dict[str, list[dict[str, Any]]], out: Path, *, overwrite: bool) -> list[Path]:
    """Writes `<out>/<split>.parquet`, each whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    check_out(out, overwrite=overwrite)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error}): name a folder that you may write") from error
    files = []
    for split, rows in splits.items():
        file = out / f"{split}.parquet"
        descriptor, unfinished = tempfile.mkstemp(dir=out, prefix=f".{split}-", suffix=".tmp")
        os.close(descriptor)
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(unfinished, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
            os.replace(unfinished, file)
        finally:
            Path(unfinished).unlink(missing_ok=True)
        files.append(file)
    return files


def check_out(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out must be a folder")
    existing = [str(out / f"{split}.parquet") for split in ("train", "test") if (out / f"{split}.parquet").exists()]
    if existing and not overwrite:
        raise ValueError(f"{' and '.join(existing)} exist already: give --overwrite, or another folder with --out")


def _join(question: str, instruction: str) -> str:
    return f"{question} {instruction}" if instruction else question


def _setting(text: str) -> tuple[str, str, Any]:
    """`chain_sum.max_terms=3` as data set, key, value; the value is json, or else a plain text."""
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form <data set>.<key>=<value>")
    name, key, value = match.groups()
    try:
        return name, key, json.loads(value)
    except json.JSONDecodeError:
        return name, key, value


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, help="folder for train.parquet and test.parquet (default: data/<dataset>)")
    common.add_argument("--overwrite", action="store_true", help="replace files that exist")
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="gsm8k|reasoning_gym")

    command = commands.add_parser("gsm8k", parents=[common], help="grade-school word problems (arXiv:2110.14168)")
    command.add_argument(
        "--source", default="openai/gsm8k:main", help="Hub id, or a folder with a train and a test file (%(default)s)"
    )
    command.add_argument("--instruction", default=GSM8K_INSTRUCTION, help="put after each question (%(default)r)")

    command = commands.add_parser("reasoning_gym", parents=[common], help="procedural problems of reasoning-gym")
    command.add_argument("names", nargs="+", metavar="name", help="data sets, such as chain_sum")
    command.add_argument("--train-size", type=_size, default=1000, help="problems of each data set (%(default)s)")
    command.add_argument("--test-size", type=_size, default=100, help="problems of each data set (%(default)s)")
    command.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    command.add_argument(
        "--set", dest="settings", type=_setting, action="append", default=[], metavar="NAME.KEY=VALUE",
        help="a setting of one data set, such as chain_sum.max_terms=3; may be given many times",
    )  # fmt: skip
    command.add_argument("--instruction", default="", help="put after each question (default: nothing)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    out = options.out or Path("data") / options.dataset
    check_out(out, overwrite=options.overwrite)  # before minutes of work
    if options.dataset == "gsm8k":
        splits = gsm8k(options.source, options.instruction)
    else:
        settings: dict[str, dict[str, Any]] = {}
        for name, key, value in options.settings:
            settings.setdefault(name, {})[key] = value
        splits = reasoning_gym(
            options.names, settings, options.train_size, options.test_size, options.seed, options.instruction
        )
    for file in write(splits, out, overwrite=options.overwrite):
        print(f"{file}: {len(splits[file.stem])} rows")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"prepare_data.py: {error}")
