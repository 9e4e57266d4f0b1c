"""What a person sees of a run: a line a step, bars while it runs, a plot of the reward afterwards.

`trainer.py` opens one `Progress` for the run; `loggers.py` prints its lines through it, so that bars and lines do not
cross. Without a terminal there are no bars, only the lines.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

# What the line shows, and the first of these metrics that the step has. The KL to the reference, where there is one.
COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("loss", "{:.4f}", ("actor/pg_loss",)),
    ("kl", "{:.5f}", ("actor/kl_loss", "actor/reward_kl_penalty", "actor/ppo_kl")),
    ("reward", "{:.3f}", ("critic/score/mean",)),
    ("clip fraction", "{:.3f}", ("actor/pg_clipfrac",)),
)
TRAINING_COLOR = "#4C78A8"
VALIDATION_COLORS = ("#F58518", "#54A24B", "#B279A2", "#E45756", "#72B7B2")


def console_line(
    epoch: int, epochs: int, step: int, steps: int, values: Mapping[str, int | float], seconds: float
) -> str:
    """`[epoch 0/3] step 100/1200 | loss 0.0123 | kl 0.00045 | reward 0.312 | clip fraction 0.021 | 1.2 s`

    A metric the step does not have is left out (no actor update during the critic's warm-up).
    """
    parts = [f"[epoch {epoch}/{epochs}] step {step:>{len(str(steps))}}/{steps}"]
    for label, form, names in COLUMNS:
        found = [values[name] for name in names if name in values]
        if found:
            parts.append(f"{label} {form.format(found[0])}")
    return " | ".join([*parts, f"{seconds:.1f} s"])


def validation_line(step: int, steps: int, values: Mapping[str, int | float]) -> str:
    """`[validation] step 100/1200 | gsm8k/reward/mean@1 0.312`: the core metrics without their deviations."""
    shown = {name.removeprefix("val-core/"): value for name, value in values.items() if name.startswith("val-core/")}
    parts = [f"{name} {value:.3f}" for name, value in shown.items() if not name.endswith("/std")]
    return " | ".join([f"[validation] step {step:>{len(str(steps))}}/{steps}", *parts])


class Progress:
    """One bar for the steps of the run, and one below it while responses are generated.

        with Progress(steps, completed=first_step) as progress:
            with progress.generation(num_sequences) as report:
                report(finished_sequences, tokens_so_far)
            progress.print(line)
            progress.completed(step)

    `shown=False` prints nothing at all (every process but the first). The bars need a terminal.
    """

    def __init__(self, steps: int, *, completed: int = 0, shown: bool = True, console: Console | None = None) -> None:
        self._console = console or Console()
        self._shown = shown
        self._bars = Bars(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=40),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
            transient=True,
        )
        self._steps = self._bars.add_task("steps", total=steps, completed=completed, note="")

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def print(self, line: str) -> None:
        if self._shown:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def completed(self, step: int) -> None:
        self._bars.update(self._steps, completed=step)

    @contextmanager
    def generation(self, num_sequences: int) -> Iterator[Callable[[int, int], None]]:
        """Gives `report(num_finished, num_tokens)`, both counted from the start of this generation."""
        task = self._bars.add_task("generate", total=num_sequences, note="")
        start = time.perf_counter()

        def report(num_finished: int, num_tokens: int) -> None:
            rate = num_tokens / (time.perf_counter() - start)
            self._bars.update(task, completed=num_finished, note=f"{rate:,.0f} tokens/s")

        try:
            yield report
        finally:
            self._bars.remove_task(task)


def plot_rewards(folder: Path, *, window: int = 10) -> Path:
    """`reward.png` from `metrics.jsonl`: the training reward by step, its running mean, and each validation."""
    training: dict[int, float] = {}
    validation: dict[str, dict[int, float]] = defaultdict(dict)
    for row in map(json.loads, (folder / "metrics.jsonl").open(encoding="utf-8")):
        if "critic/score/mean" in row:
            training[row["step"]] = row["critic/score/mean"]
        for name, value in row.items():
            if match := re.fullmatch(r"val-core/(.+)/(?:acc|reward)/(mean@\d+)", name):
                validation[f"{match[1]} {match[2]}"][row["step"]] = value

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, rewards = np.asarray(list(training)), np.asarray(list(training.values()))
    axes.plot(steps, rewards, color=TRAINING_COLOR, alpha=0.3, linewidth=1)
    label = f"training, sampled (mean of {window} steps)"
    axes.plot(steps, _running_mean(rewards, window), color=TRAINING_COLOR, linewidth=2, label=label)
    for (source, points), color in zip(validation.items(), itertools.cycle(VALIDATION_COLORS), strict=False):
        axes.plot(list(points), list(points.values()), "o-", color=color, markersize=5, label=f"validation, {source}")
    axes.set_xlabel("RL step")
    axes.set_ylabel("mean reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(folder.name, loc="left", fontsize=11)
    axes.legend(frameon=False, loc="best")
    path = folder / "reward.png"
    figure.savefig(path, dpi=160)
    return path


def _running_mean(x: np.ndarray, window: int) -> np.ndarray:
    """Of the last `window` values, or of as many as there are."""
    sums = np.concatenate([[0.0], np.cumsum(x)])
    ends = np.arange(1, len(x) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
