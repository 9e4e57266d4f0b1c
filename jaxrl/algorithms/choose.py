"""How a name in the config becomes a call: look a name up in a table, then give the function what it asks for.

Every table of this folder (`ADVANTAGES`, `POLICY_LOSSES`, `KL_ESTIMATORS`, `AGGREGATIONS`, ...) is read this way.
A user's own function stands in for a table's entry when its leading arguments and its result are those of the
entries; which keyword-only arguments it has is its own affair, because it is given only those that it names.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from jaxrl.user_code import import_function, is_user_function


def choose(table: Mapping[str, Callable], name: str | Callable, what: str, *, takes: Sequence[str] = ()) -> Callable:
    """The entry called `name`, the user's function `path/to/file.py:function`, or `name` itself when it is a function.

    `what` is the word for the thing in the error, for example "policy loss". `takes`: the arguments that the user's
    function will be given by position; without any it is not looked at.

    Raises:
        ValueError: the table has no such entry (lists the ones it has), or the user's function takes other arguments.
    """
    if callable(name):
        return name
    if is_user_function(name):
        function = _user_function(name, what)
        if takes:
            _check_takes(function, takes, f"{what} {name}")
        return function
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"Unknown {what} '{name}'.{hint} Known: {', '.join(table)}.")
    return table[name]


def _check_takes(function: Callable, takes: Sequence[str], what: str) -> None:
    signature, kinds = inspect.signature(function), inspect.Parameter
    kind_of = [p.kind for p in signature.parameters.values()]
    has_room = kinds.VAR_POSITIONAL in kind_of
    leading = [kind for kind in kind_of if kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    if not has_room and len(leading) < len(takes):  # what comes after these is given by name, as `bind` does
        raise ValueError(
            f"{what} has the parameters {signature}: it is called with ({', '.join(takes)}), and with the keywords that it "
            "names beside these"
        )


@cache
def _user_function(name: str, what: str) -> Callable:
    return import_function(name, what)


def bind(function: Callable, **available: Any) -> Callable:
    """`function` with those of the `available` keywords that its signature names (all of them if it has `**kwargs`).

    A keyword whose value is None counts as absent, so that the function's own default holds.

        advantages, returns = bind(estimator, group=group, values=values, gamma=0.99, lam=0.95)(rewards, mask)

    Raises:
        ValueError: the function needs a keyword-only argument that is not available.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    given = {key: value for key, value in available.items() if value is not None and (takes_any or key in parameters)}
    for name, parameter in parameters.items():
        is_required = parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is inspect.Parameter.empty
        if is_required and name not in given:
            raise ValueError(f"'{getattr(function, '__name__', function)}' needs `{name}`, which was not given.")
    return partial(function, **given)
