"""What a person sees: the line a step, the bars, the plot."""

import io
import json
import time

import numpy as np
from matplotlib.image import imread
from rich.console import Console

from jaxrl.progress import Progress, console_line, plot_rewards, validation_line


def test_console_line_shows_loss_kl_reward_and_clip_fraction():
    values = {
        "actor/pg_loss": 0.01234,
        "actor/ppo_kl": 0.00045,
        "critic/score/mean": 0.3125,
        "actor/pg_clipfrac": 0.0214,
    }
    line = "[epoch 0/3] step  100/1200 | loss 0.0123 | kl 0.00045 | reward 0.312 | clip fraction 0.021 | 1.2 s"
    assert console_line(0, 3, 100, 1200, values, 1.23) == line
    with_reference = console_line(0, 3, 100, 1200, {**values, "actor/kl_loss": 0.5}, 1.23)
    assert "kl 0.50000" in with_reference
    assert console_line(0, 3, 1, 9, {"critic/score/mean": 0.5}, 60.0) == "[epoch 0/3] step 1/9 | reward 0.500 | 60.0 s"


def test_validation_line_shows_the_core_means():
    values = {"val-core/a/acc/mean@4": 0.5, "val-core/a/acc/best@4/mean": 0.75, "val-core/a/acc/best@4/std": 0.1}
    line = validation_line(20, 100, {**values, "val-aux/a/reward/mean@4": 0.0})
    assert line == "[validation] step  20/100 | a/acc/mean@4 0.500 | a/acc/best@4/mean 0.750"


def run_for_two_steps(console: Console, shown: bool = True) -> None:
    with Progress(10, completed=3, shown=shown, console=console) as progress:
        for step in (4, 5):
            with progress.generation(64) as report:
                report(16, 320)
                time.sleep(0.15)  # a bar is drawn ten times a second
            progress.print(f"[epoch 0/1] step {step} " + "x" * 100)
            progress.completed(step)


def test_a_terminal_shows_a_bar_for_the_steps_and_one_for_generation():
    out = io.StringIO()
    run_for_two_steps(Console(file=out, force_terminal=True, width=120))
    text = out.getvalue()
    assert "steps" in text and "4/10" in text
    assert "generate" in text and "16/64" in text and "tokens/s" in text


def test_without_a_terminal_there_are_only_the_lines_whole():
    out = io.StringIO()
    run_for_two_steps(Console(file=out, width=80))
    assert out.getvalue() == "".join(f"[epoch 0/1] step {step} {'x' * 100}\n" for step in (4, 5))


def test_other_processes_show_nothing():
    out = io.StringIO()
    run_for_two_steps(Console(file=out, force_terminal=True), shown=False)
    assert out.getvalue() == ""


def test_plot_shows_training_and_each_validation(tmp_path):
    rng = np.random.default_rng(0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(101):
            expected = 0.15 + 0.6 / (1 + np.exp(-(step - 45) / 12))
            row: dict[str, float] = {"step": step}
            if step:
                row["critic/score/mean"] = float(np.clip(expected + rng.normal(0, 0.05), 0, 1))
            if step % 20 == 0:
                row["val-core/sums/reward/mean@1"] = float(expected + 0.06)  # greedy, beside samples:
                row["val-core/sums/reward/mean@4"] = float(expected - 0.06)
                row["val-core/sums/reward/best@4/mean"] = 1.0
                row["val-core/largest/acc/mean@4"] = float(expected * 0.8)
            file.write(json.dumps(row) + "\n")
    path = plot_rewards(tmp_path)
    assert path == tmp_path / "reward.png"
    image = imread(path)
    assert image.shape[:2] == (720, 1280)
    colors = {tuple(color) for color in (image[..., :3] * 255).astype(int).reshape(-1, 3)}
    assert {(0x4C, 0x78, 0xA8), (0xF5, 0x85, 0x18), (0x54, 0xA2, 0x4B), (0xB2, 0x79, 0xA2)} <= colors
