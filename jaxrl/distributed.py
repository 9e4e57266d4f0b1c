"""Start of a run of several processes: they find each other, agree on code and config, and JAX spans them all.

`train.py` calls `start` before anything touches a device. What the processes say to each other beside JAX goes over the
`Link` that it returns.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from .cluster import Place
from .config import Config, flat
from .link import Link
from .user_code import is_user_function

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def start(place: Place | None, c: Config) -> Link:
    """The link of this process, with JAX spread over all of them.

    Raises ValueError where the coordinator cannot be reached, a process is missing, or hosts disagree.
    """
    t = c.trainer
    timeout_s, start_timeout_s = t.heartbeat_timeout_s, t.start_timeout_s
    link = Link(
        place, heartbeat_timeout_s=timeout_s, stall_timeout_s=t.stall_timeout_s, start_timeout_s=start_timeout_s
    )
    if place is None:
        return link
    settings = flat(c)
    try:
        check_same(link, "the code", {**_code(), **_user_files(settings)})
        check_same(link, "the config", settings)
    except ValueError:  # everywhere the same: leave together, so that no one takes another's end for a death
        link.close()
        raise
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is the trainer's
    address = link.relay()
    jax.distributed.initialize(
        address, place.num_processes, place.process_id, local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate", coordinator_bind_address=address if link.is_first else None,
        initialization_timeout=int(start_timeout_s), heartbeat_timeout_seconds=int(3 * timeout_s + 60),
    )  # fmt: skip
    numbers = link.gather("the number in JAX", jax.process_index())
    if numbers != list(range(place.num_processes)):  # a TPU numbers its hosts itself
        link.close()
        raise ValueError(
            f"JAX numbers the processes 0 to {place.num_processes - 1} as {numbers}: start them in its order"
        )
    return link


def check_same(link: Link, what: str, mine: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the process and the entry, where `mine` is not the same on every process."""
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(link.gather(f"the digest of {what}", digest))) == 1:
        return
    first, *others = link.gather(what, {name: str(value) for name, value in mine.items()})
    for process_id, theirs in enumerate(others, start=1):
        for name in sorted(first.keys() | theirs.keys()):
            here, there = first.get(name, "missing"), theirs.get(name, "missing")
            if here != there:
                raise ValueError(
                    f"{link.name_of(process_id)} and {link.name_of(0)} do not agree on {what}: {name} is {there} on the "
                    f"one and {here} on the other. All processes run from the same code with the same config"
                )


def _code() -> dict[str, str]:
    """What runs here: a digest of every file of jaxrl, and versions."""
    package = Path(__file__).parent
    files = {f"jaxrl/{path.relative_to(package).as_posix()}": _digest(path) for path in package.rglob("*.py")}
    return {
        **files,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "Python": platform.python_version(),
    }


def _user_files(settings: Mapping[str, Any]) -> dict[str, str]:
    """A digest of every file of a user that the config names as path/to/file.py:function."""
    paths = {text.rpartition(":")[0] for text in _texts(list(settings.values())) if is_user_function(text)}
    return {path: _digest(file) for path in sorted(paths) if (file := Path(path).expanduser()).is_file()}


def _texts(tree: Any) -> Iterator[str]:
    """Every text in lists and dicts, however deep: rewards stand in a list."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _texts(list(tree.values()))
    elif isinstance(tree, list):
        for part in tree:
            yield from _texts(part)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
