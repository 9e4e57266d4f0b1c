"""SIGTERM: what a scheduler sends before it takes the machine away. The run saves a checkpoint and ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM  # not 0, or a scheduler would take the run for finished


class Preemption:
    """Within it, SIGTERM is noted instead of ending the process; the trainer looks after each step.

    Outside the main thread, where Python takes no signals, nothing is noted.
    """

    noticed = False

    def __enter__(self) -> Preemption:
        self._takes_signals = threading.current_thread() is threading.main_thread()
        if self._takes_signals:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def _notice(self, signum: int, frame: FrameType | None) -> None:
        self.noticed = True  # launchers and schedulers may send it more than once

    def __exit__(self, *_: object) -> None:
        if self._takes_signals:
            signal.signal(signal.SIGTERM, self._before)
