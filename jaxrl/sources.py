"""Where rows come from: `load_rows` reads a dataset out of memory, files, the Hub, a function or a built-in task.

The stage before `data.py`, which turns rows into prompts. Whatever is wrong with a source ends in a ValueError that
names it and the fix; `datasets` is imported only by the sources that need it, as that takes more than a second.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from jaxrl.tasks import TASKS
from jaxrl.user_code import import_function, is_user_function, what_failed

SUFFIXES = (".parquet", ".jsonl", ".json")
_JSON_FORMS = "a file holds one row a line, or one list of rows"
KNOWN_SPLITS = ("train", "test", "validation", "valid", "val", "dev")


class Rows(Protocol):
    """What a dataset must offer: a length and rows by number. A `datasets.Dataset` and a list of dicts both do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def load_rows(source: Any, *, split: str | None = None, kwargs: Mapping[str, Any] | None = None) -> Rows:
    """Rows from any source; raises ValueError with the fix in words when there are none.

    `source` is one of
      - a `datasets.Dataset`, a `datasets.DatasetDict` (then `split` picks), or a list of dicts;
      - a parquet, json or jsonl file, a list of such files, or a folder that holds them (`split` then picks the files
        named `<split>.*` or `<split>-00000-of-00001.*`, or the sub-folder `<split>/`), or a `save_to_disk` folder;
        to files that are named one by one a split means nothing;
      - a Hub id: `org/name` or `org/name:config`;
      - `task:<name>`, a built-in procedural task (`jaxrl.tasks.TASKS`);
      - `path/to/file.py:function`, or the function itself, which returns or yields rows.
    `kwargs` go to the task, the function or, for a Hub id, to `datasets.load_dataset`. A function gets `split` too if
    it is set.
    """
    kwargs = dict(kwargs or {})
    if isinstance(source, str) and source.startswith("task:"):
        rows: Any = _rows_of_task(source.removeprefix("task:"), split, kwargs)
    elif isinstance(source, str) and is_user_function(source):
        rows = _rows_of_function(import_function(source, "data"), source, split, kwargs)
    elif isinstance(source, str) and _is_hub_id(source):
        rows = _rows_of_hub(source, split, kwargs)
    elif isinstance(source, (str, Path)) or _is_list_of_paths(source):
        _refuse_kwargs(kwargs, source)
        rows = _rows_of_files(source, split)
    elif callable(source):
        rows = _rows_of_function(source, getattr(source, "__name__", repr(source)), split, kwargs)
    else:
        _refuse_kwargs(kwargs, type(source).__name__)
        rows = _pick_split(source, split, "the DatasetDict")
    name = source if isinstance(source, (str, Path)) else f"the {type(source).__name__}"
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, Mapping):
        raise ValueError(
            f"{name} cannot be read as a dataset: give a datasets.Dataset (not a streaming one), a list of dicts, "
            f"a parquet/json/jsonl file or folder, a Hub id, task:<name> or path/to/file.py:function"
        )
    if len(rows) == 0:
        raise ValueError(f"{name} is empty: a dataset needs at least one row")
    if isinstance(rows, list):
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"row {number} of {name} is a {type(row).__name__}: each row must be a dict of columns"
                )
    return rows


def _rows_of_task(name: str, split: str | None, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}: the built-in tasks are {', '.join(sorted(TASKS))}")
    if "size" not in kwargs:
        raise ValueError(f"task:{name} needs a size: the number of problems, such as size=256")
    return _call(TASKS[name], f"task:{name}", {"split": split or "train", "seed": 0, **kwargs})


def _rows_of_function(function: Callable[..., Any], name: str, split: str | None, kwargs: dict[str, Any]) -> Rows:
    rows = _call(function, name, kwargs if split is None else {"split": split, **kwargs})
    if isinstance(rows, Iterator):
        try:
            return list(rows)
        except Exception as error:
            raise _failed(name, error) from error
    if not isinstance(rows, Iterable):
        raise ValueError(f"{name} returned {type(rows).__name__}: it must return or yield rows, each a dict")
    return _pick_split(rows, split, name)


def _call(function: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> Any:
    """`function(**kwargs)`, with the parameters it takes in the error when these do not fit."""
    signature = inspect.signature(function)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; its parameters are {signature}") from None
    try:
        return function(**kwargs)
    except Exception as error:
        raise _failed(name, error) from error


def _failed(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} failed: {what_failed(error)}")


def _is_hub_id(source: str) -> bool:
    """`org/name` or `org/name:config`, unless something of that name is on disk or it ends as a data file does."""
    looks_so = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+)?", source) is not None
    return looks_so and not Path(source).exists() and Path(source).suffix not in (*SUFFIXES, ".py", ".csv", ".arrow")


def _rows_of_hub(source: str, split: str | None, kwargs: dict[str, Any]) -> Rows:
    import datasets

    repository, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split, **kwargs)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"there is no file or folder {repository}, and as a dataset of the Hugging Face Hub it could not be read "
            f"({error}): check the name and the network (a private one needs `hf auth login`), or give a local file"
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"the dataset {repository} is a loading script, and scripts are not run: convert it to parquet, give "
            f'kwargs {{"revision": "refs/convert/parquet"}} if the Hub has converted it, or name a function of '
            f"yours as path/to/file.py:function"
        ) from error
    except (ValueError, TypeError) as error:  # an unknown config, split or keyword; datasets lists the known ones
        raise ValueError(f"the dataset {source} with split {split!r} could not be read: {error}") from error
    return _pick_split(rows, split, source)


def _pick_split(rows: Any, split: str | None, name: str) -> Any:
    """Out of a mapping of splits (`datasets.DatasetDict`) the one asked for, or the only one; else `rows` as they are."""
    if not isinstance(rows, Mapping):
        return rows
    if split is None and len(rows) == 1:
        return next(iter(rows.values()))
    if split not in rows:
        asked = "no split was given" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{name} has the splits {', '.join(map(str, rows))} and {asked}: set the split to one of them")
    return rows[split]


def _is_list_of_paths(source: Any) -> bool:
    # A list loaded from YAML by OmegaConf is a ListConfig, hence no test for `list`.
    return isinstance(source, Sequence) and len(source) > 0 and all(isinstance(item, (str, Path)) for item in source)


def _refuse_kwargs(kwargs: Mapping[str, Any], source: Any) -> None:
    if kwargs:
        raise ValueError(f"{source} takes no kwargs, but {', '.join(kwargs)} were given: remove them")


def _rows_of_files(source: Any, split: str | None) -> Rows:
    """Rows of one file, of several read one after the other, or of the files in a folder."""
    if isinstance(source, (str, Path)) and (folder := Path(source).expanduser()).is_dir():
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            import datasets

            return _pick_split(datasets.load_from_disk(str(folder)), split, str(folder))
        files = _files_of_folder(folder, split)
    else:
        files = [Path(path).expanduser() for path in ([source] if isinstance(source, (str, Path)) else source)]
    for file in files:
        _check_file(file)
    suffixes = {file.suffix for file in files}
    if suffixes == {".parquet"}:
        return _read_parquet(files)
    if ".parquet" in suffixes:
        raise ValueError(f"{', '.join(map(str, files))}: parquet files cannot be mixed with other kinds in one dataset")
    return [row for file in files for row in _read_json(file)]


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise ValueError(
            f"there is no file {file}: a dataset is a {', '.join(SUFFIXES)} file, a folder of them, a Hub id (org/name), "
            f"task:<name> or path/to/file.py:function"
        )
    if file.suffix == ".py":
        raise ValueError(
            f"{file} is a Python file, and dataset scripts are not run: name the function that yields the rows, "
            f"as {file}:function, or convert the dataset to parquet"
        )
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} has the ending {file.suffix!r}: a dataset file ends in {', '.join(SUFFIXES)}")


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """The data files of one split. parquet goes before jsonl before json, as json files are often only about the data."""
    if split is not None and (folder / split).is_dir():
        return _files_of_folder(folder / split, None)
    for place in (folder, folder / "data"):
        for suffix in SUFFIXES:
            files = sorted(place.glob(f"*{suffix}"))
            splits = [known for known in KNOWN_SPLITS if any(_is_of_split(file, known) for file in files)]
            if split is None and len(splits) > 1:
                raise ValueError(f"{place} holds the splits {', '.join(splits)}: set the split to one of them")
            if split is not None:
                files = [file for file in files if _is_of_split(file, split)]
            if files:
                return files
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    what = "no file" if split is None else f"no file of the split {split!r}"
    raise ValueError(f"{folder} has {what} that ends in {', '.join(SUFFIXES)}; it holds {found}")


def _is_of_split(file: Path, split: str) -> bool:
    """`train.parquet`, `train-00000-of-00001.parquet`, `train_0.jsonl`, but not `train_socratic.jsonl`."""
    return re.fullmatch(rf"{re.escape(split)}([-_.]?\d.*)?", file.stem) is not None


def _read_parquet(files: Sequence[Path]) -> Rows:
    """A memory-mapped `datasets.Dataset` over the files."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        return cast(Rows, datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train"))
    except (DatasetGenerationError, ValueError) as error:  # pyarrow's own are ValueErrors
        reason = error.__cause__ or error
        raise ValueError(f"{', '.join(map(str, files))} could not be read as parquet: {reason}") from error


def _read_json(file: Path) -> list[Any]:
    """A file with one row a line, or one json list of rows.

    Read without pyarrow, which turns strings that look like dates into dates and so would change answers.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # as UTF-8, and without the mark that Windows puts before it
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}): save it as UTF-8") from None
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid json ({error}): {_JSON_FORMS}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {file} is not valid json ({error}): {_JSON_FORMS}") from None
    return rows
