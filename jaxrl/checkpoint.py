"""Checkpoints of a run: everything on the devices as sharded arrays (orbax), everything else as JSON.

`trainer.py` saves every `trainer.save_freq` steps and restores the last one at a start. The arrays are written in the
background while training goes on. A folder counts once it is complete; a run that is killed loses the steps since the
last complete one and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

Tree = Any
log = logging.getLogger(__name__)
LATEST_FILE = "latest_checkpointed_iteration.txt"  # verl's name; for people and scripts, we look at the folders
COMPLETE_FILE = "commit_success.txt"  # orbax writes it last


class Checkpoints:
    """The folders `global_step_<n>` of one run, on a disk that all processes share.

    With several processes all of them call the same methods with the same arguments; process 0 does the tidying.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_to_keep: int | None = None) -> None:
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep {max_to_keep} must be 1 or more, or null to keep every checkpoint")
        self._folder = epath.Path(folder if "://" in str(folder) else os.path.abspath(folder))  # as orbax wants it
        self._max_to_keep = max_to_keep
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Start to save `state`, a tree of arrays, and `meta`, anything JSON can hold; the arrays may be donated next.

        Waits for the save before it, whose error it raises. When the new checkpoint is complete, the oldest beyond
        `max_to_keep` are removed, and so are those of later steps: this run went back and left their course.
        A checkpoint of the same step is replaced.
        """
        self.wait()
        json.dumps(meta)  # what JSON cannot hold raises here, not in the background
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob("global_step_*"):
                if not _is_complete(path) or _step_of(path) == step:  # killed half-way, or to be replaced
                    _remove(path)
        with _context():
            response = ocp.save_async(self._path(step), state, custom_metadata=meta)
        self._pending = self._background.submit(self._finish, step, response.result)

    def check(self) -> None:
        """Raises what a save under way has raised by now."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Until the save under way is complete, when a run ends with an error: what it raises is only logged then."""
        try:
            self.wait()
        except Exception:
            log.exception("the checkpoint that was being saved is lost")

    def wait(self) -> None:
        """Until the save under way is complete and old ones are gone; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending. One that is being saved does not count yet."""
        if not self._folder.exists():
            return []
        return sorted(_step_of(path) for path in self._folder.glob("global_step_*") if _is_complete(path))

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def restore(self, step: int, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """The state and meta of a step, bit for bit, with the shardings of `abstract` (of any mesh).

        `abstract` has the structure that was saved, each leaf a `jax.ShapeDtypeStruct` with a sharding. Raises
        ValueError, naming the array, if its shapes or types are not those of the checkpoint, and where that is damaged.
        """
        self.wait()
        if step not in self.steps():
            raise ValueError(f"no checkpoint of step {step} in {self._folder}: there are {self.steps() or 'none'}")
        path = self._path(step)
        with _perhaps_damaged(path):
            metadata = ocp.metadata(path)
            if metadata.metadata is None:  # orbax has logged why
                raise ValueError("its list of arrays is lost")
        _check_same_arrays(path, metadata.metadata, abstract)
        meta: Tree = metadata.custom_metadata
        with _perhaps_damaged(path):
            return ocp.load(path, abstract), meta

    def _path(self, step: int) -> epath.Path:
        return self._folder / f"global_step_{step}"

    def _finish(self, step: int, wait_until_complete: Callable[[], None]) -> None:
        wait_until_complete()
        if jax.process_index() != 0:
            return
        pointer = self._folder / f".{LATEST_FILE}"
        pointer.write_text(str(step))
        pointer.replace(self._folder / LATEST_FILE)
        up_to_now = [n for n in self.steps() if n <= step]
        kept = up_to_now if self._max_to_keep is None else up_to_now[-self._max_to_keep :]
        for n in self.steps():
            if n not in kept:
                _remove(self._path(n))


def _context() -> ocp.Context:
    context = ocp.Context()
    # zstd makes float32 weights about a tenth smaller and the save three times slower.
    context.array.saving.use_compression = False
    return context


def _step_of(path: epath.Path) -> int:
    return int(path.name.removeprefix("global_step_"))


def _is_complete(path: epath.Path) -> bool:
    return re.fullmatch(r"global_step_\d+", path.name) is not None and (path / COMPLETE_FILE).exists()


@contextmanager
def _perhaps_damaged(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds, by what orbax misses first; some describe the array for pages
        log.debug("checkpoint %s", path, exc_info=True)
        reason = textwrap.shorten(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}", 200)
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason}). Where it is damaged, and not the memory or the disk too small, "
            "remove that folder and go on from an earlier one"
        ) from error


def _remove(path: epath.Path) -> None:
    # First what makes it count: killed in the middle of the removal, it is no checkpoint any more.
    (path / COMPLETE_FILE).unlink(missing_ok=True)
    path.rmtree()


def _check_same_arrays(path: epath.Path, saved: Tree, wanted: Tree) -> None:
    theirs, ours = _described(saved), _described(wanted)
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            there, here = theirs.get(name, "missing"), ours.get(name, "not used")
            settings = "mesh.data" if ".residual" in name else "model, critic and optimizer settings"
            raise ValueError(
                f"checkpoint {path} does not fit this run: {name} is {there} in the checkpoint and {here} here; resume "
                f"with the {settings} it was saved with, or start another run directory"
            )


def _described(tree: Tree) -> dict[str, str]:
    """Name -> dtype and shape of every array. Dicts, tuples and named tuples all give plain dotted names."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
