"""Where a run is written down: metrics.jsonl, samples.jsonl, TensorBoard, wandb, and a line a step on the console.

`trainer.py` calls `Metrics.log` and `Samples.log` once a step. A run that goes on after a kill goes on in the same
files, and each step stands in them once.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import netrc
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import jax
import numpy as np

from .algorithms.choose import choose
from .progress import console_line, validation_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What every writer needs to know of the run."""

    folder: Path
    project: str
    experiment: str
    config: dict[str, Any]
    epochs: int
    steps: int
    first_step: int  # the first that will be logged: a run that goes on writes it anew, with all after it


class Metrics:
    """Writes the metrics of a step to each of `loggers` (the keys of `LOGGERS`). Only process 0 writes."""

    def __init__(self, run: Run, loggers: Sequence[str], *, print_line: Callable[[str], None] = print) -> None:
        for name in loggers:
            check_logger(name)
        self._loggers: list[Logger] = []
        if jax.process_index() == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            self._loggers = [LOGGERS[name](run, print_line) for name in loggers]

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """`values`: numbers of Python, numpy or jax, each a scalar. Called once a step, steps ascending."""
        numbers = {name: np.asarray(value).item() for name, value in values.items()}
        for logger in self._loggers:
            logger.log(step, numbers)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


class Samples:
    """samples.jsonl: what was asked, what was answered, what it earned."""

    def __init__(self, run: Run) -> None:
        self._lines: JsonLines | None = None
        if jax.process_index() == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(run.folder / "samples.jsonl", run.first_step)

    def log(
        self,
        step: int,
        *,
        split: str,
        prompts: Sequence[str],
        responses: Sequence[str],
        ground_truths: Sequence[Any],
        rewards: Sequence[int | float] | np.ndarray,
        data_sources: Sequence[str],
    ) -> None:
        if self._lines is None:
            return
        for prompt, response, truth, reward, source in zip(
            prompts, responses, ground_truths, rewards, data_sources, strict=True
        ):
            row = {"step": step, "split": split, "data_source": source, "prompt": prompt, "response": response}
            self._lines.write({**row, "ground_truth": truth, "reward": float(reward)})

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


class JsonLines:
    """One object a line, each with its `step`, in the file as soon as it is written.

    Lines of `first_step` and later are dropped at the start: a run that was killed wrote them after the checkpoint that
    this one goes on from. So is a line that was cut short. Floats are written so that they read back bit for bit.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        if path.exists():
            kept = path.with_name(f".{path.name}")
            # Bytes that are no text make their line one that nobody reads.
            with path.open(encoding="utf-8", errors="surrogateescape") as old, kept.open("w", encoding="utf-8") as new:
                new.writelines(line for line in old if line.endswith("\n") and _step_of(line, path) < first_step)
            kept.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str, path: Path) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} holds a line that no run has written ({line[:40]!r}): remove it, or move the file away"
        ) from None


def check_logger(name: str) -> None:
    """Raises ValueError where there is no such logger, or its package is not installed."""
    choose(LOGGERS, name, "trainer.logger")
    if name == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "logger 'wandb' needs the package wandb: pip install 'jaxrl[wandb]', or leave it out of trainer.logger"
        )


@contextmanager
def process_log(folder: Path, process_id: int) -> Iterator[None]:
    """Within it, logs/process_<i>.log takes down what this process logs, and the error that ends it."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "logs" / f"process_{process_id}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("jaxrl")
    level = ours.level
    root.addHandler(file)
    ours.setLevel(logging.INFO)
    try:
        yield
    except BaseException:
        file.emit(log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run has ended", (), sys.exc_info()))
        raise
    finally:
        root.removeHandler(file)
        ours.setLevel(level)
        file.close()


class Logger(Protocol):
    def __init__(self, run: Run, print_line: Callable[[str], None]) -> None: ...

    def log(self, step: int, values: Mapping[str, int | float]) -> None: ...

    def close(self) -> None: ...


class ConsoleLogger:
    """A line for a step of training, a line for a validation."""

    def __init__(self, run: Run, print_line: Callable[[str], None]) -> None:
        self._run, self._print_line = run, print_line

    def log(self, step: int, values: Mapping[str, int | float]) -> None:
        if "timing_s/step" in values:
            epoch, seconds = int(values["training/epoch"]), values["timing_s/step"]
            self._print_line(console_line(epoch, self._run.epochs, step, self._run.steps, values, seconds))
        if any(name.startswith("val-core/") for name in values):
            self._print_line(validation_line(step, self._run.steps, values))

    def close(self) -> None: ...


class JsonlLogger:
    """metrics.jsonl."""

    def __init__(self, run: Run, print_line: Callable[[str], None]) -> None:
        self._lines = JsonLines(run.folder / "metrics.jsonl", run.first_step)

    def log(self, step: int, values: Mapping[str, int | float]) -> None:
        self._lines.write({"step": step, **values})

    def close(self) -> None:
        self._lines.close()


class TensorBoardLogger:
    """Event files in tensorboard/; TensorBoard itself hides what was logged at or after `first_step` before."""

    def __init__(self, run: Run, print_line: Callable[[str], None]) -> None:
        from tensorboardX import SummaryWriter

        # The library names the file by host and second: one of the same second would be overwritten.
        suffix = f".{run.first_step:08d}"
        folder = str(run.folder / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=run.first_step, flush_secs=10, filename_suffix=suffix)

    def log(self, step: int, values: Mapping[str, int | float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases; without an API key the run is kept in wandb/, for `wandb sync`."""

    def __init__(self, run: Run, print_line: Callable[[str], None]) -> None:
        import wandb  # pyright: ignore[reportMissingImports] (an extra)

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        if mode == "offline":
            log.warning("wandb runs offline: send it later with `wandb sync %s`", run.folder / "wandb" / "offline-*")
        id_file = run.folder / "wandb_id.txt"  # a run that goes on is the same run there
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=run.project,
            name=run.experiment,
            config=run.config,
            dir=str(run.folder),
            mode=mode,
            id=id_file.read_text(),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, int | float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _plain(x: Any) -> Any:
    """Ground truths come from parquet files as whatever numpy made of them."""
    return x.tolist() if isinstance(x, np.ndarray | np.generic) else str(x)


def _has_wandb_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or (path.exists() and host in netrc.netrc(path).hosts)


LOGGERS: dict[str, type[Logger]] = {
    "console": ConsoleLogger,
    "jsonl": JsonlLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}
