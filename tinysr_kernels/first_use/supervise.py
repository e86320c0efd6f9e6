"""The parent's side of the self-check: children check items one after another; one that dies is blamed on its item.

An illegal access takes the CUDA context of its process with it, so it must not happen in the user's. A child reads the
items from stdin and says on stdout what it does: "begin" KEY, "run" KEY when it launches the item's kernels, and the
verdict. When it dies or is silent for too long while it runs kernels, these are at fault, and a new child takes the
rest. Everything is bounded: the silence, the children, the whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tinysr_kernels.errors import shorten
from tinysr_kernels.first_use import children
from tinysr_kernels.first_use.items import Item
from tinysr_kernels.first_use.verdicts import CRASHED, HUNG, KINDS, UNCHECKED, Verdict, verdict

MARK = "tinysr-self-check "
"""Begins each line of a child that is meant for its parent; anything else is what libraries print."""
CHILD = "tinysr_kernels.first_use.child"
LAST_LINES = 20
SWITCH = "TINYSR_SELF_CHECK"


@dataclass(frozen=True)
class Bounds:
    """Seconds for a child to start (importing torch from a slow disk), for one step of an item, and for everything.

    children: after as many have died or hung, kernels as such are at fault on this machine.
    """

    start: float = 120.0
    step: float = 60.0
    total: float = 180.0
    children: int = 4


@dataclass
class Outcome:
    """verdicts: by key, of the items about which something was found out.

    general: why no kernel can be built at all, with the remedy. obstacle: why the check itself could not be done, or
    not to the end.
    """

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    general: str = ""
    obstacle: str = ""


def run(
    items: Sequence[Item], device: torch.device, bounds: Bounds | None = None, start: Sequence[str] | None = None
) -> Outcome:
    """Check the items on the device. start: the command of a child, for tests. Raises nothing but KeyboardInterrupt."""
    bounds = bounds or Bounds()
    made = _Check(list(items), device, bounds, list(start or children.command(CHILD)), time.monotonic() + bounds.total)
    for _ in range(bounds.children):
        if not made.left or made.outcome.obstacle or made.outcome.general:
            break
        made.one_child()
    if made.left and not made.outcome.obstacle and not made.outcome.general:
        made.given_up()
    return made.outcome


class _Check:
    """The state between children: what is left, and what was found out."""

    def __init__(self, items: list[Item], device: torch.device, bounds: Bounds, start: list[str], end: float) -> None:
        self.left = {item.key: item for item in items}
        self.device, self.bounds, self.start, self.end = device, bounds, start, end
        self.outcome = Outcome()

    def one_child(self) -> None:
        """Start a child on what is left and follow it until it ends, or is ended."""
        try:
            child = _Child(self.start, _request(self.left.values(), self.device))
        except (OSError, ValueError) as error:
            self.outcome.obstacle = f"no process could be started: {error}"
            return
        try:
            self._follow(child)
        finally:
            child.kill()

    def given_up(self) -> None:
        """Items are left after the last child: nothing is safe, unless the references were at fault."""
        lost = sum(one.kind in (CRASHED, HUNG) for one in self.outcome.verdicts.values())
        if lost >= self.bounds.children:
            self.outcome.general = f"{lost} processes that ran kernels here crashed or hung"
        else:
            self.outcome.obstacle = f"{self.bounds.children} processes ended before everything was checked"

    def _follow(self, child: _Child) -> None:
        """Take the child's messages. phase: what it said last, and of which item."""
        phase, key = "start", ""
        settled = len(self.left)
        while self.left:
            limit = self.bounds.start if phase == "start" else self.bounds.step
            left = self.end - time.monotonic()
            message = child.next(max(min(limit, left), 0.0))
            if message is None and left <= limit and child.runs():
                self.outcome.obstacle = f"it took more than {self.bounds.total:.0f} s"
                return
            if message is None:
                self._ended(child, phase, key, limit, progress=len(self.left) < settled)
                return
            phase = next((word for word in ("begin", "run") if word in message), "between")
            key = str(message.get(phase, ""))
            if not self._take(message):
                return

    def _take(self, message: dict[str, Any]) -> bool:
        """Note what a message says -> whether the child goes on."""
        self.outcome.obstacle = str(message.get("obstacle", ""))
        self.outcome.general = str(message.get("general", ""))
        item = self.left.get(str(message.get("verdict", "")))
        if item is not None:
            self._settle(item, str(message.get("kind")), str(message.get("reason", "")))
        return not (self.outcome.obstacle or self.outcome.general)

    def _settle(self, item: Item, kind: str, reason: str) -> None:
        self.outcome.verdicts[item.key] = verdict(item, kind if kind in KINDS else UNCHECKED, reason)
        del self.left[item.key]
        if kind in (CRASHED, HUNG):  # the operator is barred at all sizes: others need not crash too
            self.left = {key: one for key, one in self.left.items() if one.op != item.op}

    def _ended(self, child: _Child, phase: str, key: str, limit: float, progress: bool) -> None:
        """The child died, or was silent for too long: whose fault it is."""
        hung = child.runs()
        how = f"silent for {limit:.0f} s" if hung else child.how_it_died()
        item = self.left.get(key)
        if item is not None:
            kind = UNCHECKED if phase == "begin" else HUNG if hung else CRASHED
            self._settle(item, kind, how)
        elif not progress:
            self.outcome.obstacle = f"the process that checks did not get to work: {how}"


class _Child:
    """A child process whose output a thread reads."""

    def __init__(self, start: list[str], request: bytes) -> None:
        options: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            options = {"creationflags": getattr(subprocess, "CREATE_NO_WINDOW", 0)}
        self.process = subprocess.Popen(
            start,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, SWITCH: "0"},
            **options,
        )
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.ended = False
        threading.Thread(target=self._send, args=(request,), daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None when none came in time, or none will come."""
        try:
            found = self.messages.get(timeout=seconds)
        except queue.Empty:
            return None
        self.ended = self.ended or found is None
        return found

    def runs(self) -> bool:
        """Whether it may still say something."""
        return not self.ended

    def how_it_died(self) -> str:
        """Its exit code or signal, and the last line that it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.returncode
        try:
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        except ValueError:
            how = f"signal {-(code or 0)}"
        return how + (f", {shorten(self.last[-1])}" if self.last else "")

    def kill(self) -> None:
        """End it with the compilers that it started. One that the driver holds on to is left behind."""
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()

    def _send(self, request: bytes) -> None:
        """stdin stays open: its end tells the child that this process is gone."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(request)
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream, contextlib.suppress(OSError, ValueError):
            for raw in stream:
                line = raw.decode("utf-8", "replace").strip()
                if line.startswith(MARK):
                    message = _parsed(line.removeprefix(MARK))
                    if message is not None:
                        self.messages.put(message)
                elif line:
                    self.last.append(line)
        self.messages.put(None)


def _parsed(text: str) -> dict[str, Any] | None:
    """A message; None for anything else that begins with the mark."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _request(items: Any, device: torch.device) -> bytes:
    """One line of JSON. The GPU goes by its UUID too: CUDA_VISIBLE_DEVICES may have changed since torch read it."""
    where: dict[str, Any] = {"type": device.type}
    if device.type == "cuda":
        where |= {"index": device.index or 0, "uuid": uuid_of(device)}
    content = {"device": where, "items": [{"key": item.key, "call": item.call} for item in items]}
    return (json.dumps(content) + "\n").encode()


def uuid_of(device: torch.device) -> str:
    """The UUID of a GPU; empty where this torch does not tell."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
