"""A user's own function, named in the config as `path/to/file.py:function`: a reward, rows of data, a loss."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def is_user_function(name: object) -> bool:
    return isinstance(name, str) and re.search(r"^[^\n]{1,255}\.py:\w+$", name) is not None


def import_function(name: str, what: str) -> Callable[..., Any]:
    """The function; `what` is the word for it in the error ("reward"). Raises ValueError in one sentence."""
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{what} {name}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"jaxrl_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{what} {name}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    sys.path.insert(0, str(path.parent))  # so that the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what} {name}: importing {path} failed: {what_failed(error)}.") from error
    if attribute not in vars(module):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        close = difflib.get_close_matches(attribute, functions, n=1)
        hint = f"did you mean {close[0]}?" if close else f"its functions are: {', '.join(functions) or 'none'}."
        raise ValueError(f"{what} {name}: {path} has no function {attribute}; {hint}")
    function = vars(module)[attribute]
    if not callable(function):
        raise ValueError(f"{what} {name}: {attribute} in {path} is not a function but a {type(function).__name__}.")
    return function


def what_failed(error: BaseException) -> str:
    """What an error in a user's code says, in one line, and where it came about: `KeyError: 'x' (mine.py, line 6)`."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():  # says where itself
        return said
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({Path(frame.filename).name}, line {frame.lineno})"
