"""Processes that are started together and end together: what the launchers on this machine and over ssh have in common.

Each one's lines are copied with its label before them. When one ends badly the others have a while to say why they end
too, then they are killed, and the last line names the one that was first. SIGTERM and Ctrl-C are handed on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from .link import PEER_LOST
from .preemption import EXIT_CODE as PREEMPTED

PATIENCE_S = 5.0  # for the others to end by themselves
_UNREACHED = 255  # ssh's own exit code


class Member:
    """One of them. `name` is what the verdict calls it.

    With `first_line` its input begins with that and stays open: that it ends is how a process on another host is told
    to save and end. Without, it is told by SIGTERM.
    """

    def __init__(
        self,
        label: str,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        first_line: str | None = None,
    ):
        self.name = name
        self._popen = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL if first_line is None else subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.pid = self._popen.pid
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.write(f"{first_line}\n")
                self._popen.stdin.flush()
        self._copier = threading.Thread(target=self._copy, args=(label,), daemon=True)
        self._copier.start()
        self.was_killed = False

    def _copy(self, label: str) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            print(f"[{label}] {line.rstrip()}", flush=True)

    @property
    def code(self) -> int | None:
        """The exit code as a shell counts: 128 + the signal. None: it runs."""
        code = self._popen.poll()
        return 128 - code if code is not None and code < 0 else code

    def ask_to_end(self) -> None:
        if self._popen.stdin is None:
            self._popen.send_signal(signal.SIGTERM)
        else:
            self._popen.stdin.close()

    def end(self) -> None:
        """Kill what is left of it, also where it is stopped."""
        self.was_killed = self.code is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        self._copier.join(timeout=2)

    def how(self) -> str:
        """How it ended, in words."""
        code = self.code or 0
        if self.was_killed:
            return "did not answer any more and was killed"
        if code == _UNREACHED:
            return "could not be reached, or its connection broke"
        if code > 128 and code - 128 in signal.valid_signals():
            return f"was killed by {signal.Signals(code - 128).name}"
        return f"ended with exit code {code}"


def wait(starting: Iterable[Member]) -> int:
    """Start them, and wait until all have ended. Returns the exit code of the run: of the one that was the reason, or 0.

    `starting` is best a generator: a signal that comes while they start is then handed on to each of them.
    """
    members: list[Member] = []
    asked = False

    def hand_on(signum: int, frame: object) -> None:
        nonlocal asked
        asked = True
        for member in members:
            member.ask_to_end()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, hand_on)
    for member in starting:
        members.append(member)
        if asked:
            member.ask_to_end()
    deadline = None
    ended: list[Member] = []  # in their order
    while len(ended) < len(members):
        ended += [member for member in members if member.code is not None and member not in ended]
        if deadline is None and any(member.code not in (0, PREEMPTED) for member in ended):
            deadline = time.monotonic() + PATIENCE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for member in members:
        member.end()
    return _verdict([*ended, *(member for member in members if member not in ended)])


def _verdict(members: list[Member]) -> int:
    bad = [member for member in members if member.code]
    if not bad:
        return 0
    if all(member.code == PREEMPTED for member in bad):
        return PREEMPTED
    own = [member for member in bad if not member.was_killed and member.code not in (PEER_LOST, PREEMPTED)]
    reason = (own or [member for member in bad if member.was_killed] or bad)[0]
    print(f"error: {reason.name} {reason.how()}; the run has ended", file=sys.stderr, flush=True)
    return reason.code or 1
