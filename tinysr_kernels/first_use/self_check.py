"""The self-check: at the first `compile` on a GPU, the model's kernels are held to the references, once.

A child process runs every distinct launch of the model (`child.py`). What is wrong, crashes, hangs or does not compile
is barred (`launch/guard.py`), so that PyTorch computes it from the first image on, and one notice says so. Verdicts are
kept (`verdicts.py`): the next process reads them instead. TINYSR_SELF_CHECK=0 leaves kernels unchecked, "always" checks
at every compile. Items that nothing was found out about, because time ran out or the check itself failed, are used.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from tinysr_kernels.errors import shorten
from tinysr_kernels.first_use import children, supervise, verdicts
from tinysr_kernels.first_use.items import Item, items_of
from tinysr_kernels.first_use.supervise import SWITCH, Outcome
from tinysr_kernels.first_use.verdicts import CRASHED, HUNG, PASSED, UNCHECKED, UNTRUSTED, Verdict, verdict
from tinysr_kernels.launch import guard
from tinysr_kernels.launch.device import gpu_at
from tinysr_kernels.launch.kernel import interpreting
from tinysr_kernels.ops import Operator

SHOWN = 3
"""Verdicts that a notice names."""

logger = logging.getLogger("tinysr_kernels")
_lock = threading.Lock()
_found: dict[tuple[Any, ...], dict[str, Verdict]] = {}
"""What this process knows, by environment: the cache folder may be unwritable."""
_ended: dict[torch.device, Outcome] = {}
"""Why a check could not be done to the end: not tried again at every compile."""
_postponed: ContextVar[bool] = ContextVar("postponed", default=False)
_said: set[tuple[torch.device, str]] = set()


@dataclass(frozen=True)
class Findings:
    """One verdict per item, in order; general and obstacle as in `supervise.Outcome`; checked: how many just now.

    An item without a verdict has that on another item which condemns its operator, if there is one. unkept: why the
    verdicts could not be written, or nothing.
    """

    verdicts: tuple[Verdict, ...]
    general: str = ""
    obstacle: str = ""
    checked: int = 0
    unkept: str = ""

    @property
    def barred(self) -> tuple[Verdict, ...]:
        """The verdicts that bar kernels."""
        return tuple(dict.fromkeys(one for one in self.verdicts if one.kind not in (PASSED, UNCHECKED)))


def at_compile(calls: Iterable[Operator | None], device: torch.device) -> None:
    """Check the calls of a model as the environment asks, bar what fails, say so. Raises nothing.

    calls: of one image, on meta tensors.
    """
    if not applies(device):
        return
    try:
        found = check(calls, device, again=os.environ.get(SWITCH, "").strip().lower() == "always")
        _report(found, device, gpu_at(device).name)
    except Exception as error:  # noqa: BLE001  a check that fails must not keep anybody from working
        _say(device, f"the self-check of the kernels failed: {shorten(f'{type(error).__name__}: {error}', 300)}")


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Inside, `compile` checks nothing: the caller does."""
    token = _postponed.set(True)
    try:
        yield
    finally:
        _postponed.reset(token)


def applies(device: torch.device) -> bool:
    """Whether kernels on this device are checked: on GPUs, unless the environment says otherwise."""
    asked = os.environ.get(SWITCH, "").strip() != "0" and not _postponed.get()
    return asked and device.type == "cuda" and not interpreting() and not guard.is_off()


def check(
    calls: Iterable[Operator | None],
    device: torch.device,
    *,
    again: bool = False,
    run: Callable[[Sequence[Item], torch.device], Outcome] = supervise.run,
) -> Findings:
    """Check the distinct calls that this machine has no verdict on, and bar what fails. Says nothing of it.

    again: check all of them. run: checks items on a device (`supervise.run`).
    """
    gpu = gpu_at(device)
    items = items_of(calls, gpu)
    with _lock:
        here = verdicts.environment(gpu)
        known = _found.setdefault((device, *map(str, here.values())), {})
        if again:
            _start_anew(known, device)
        else:
            known |= {key: one for key, one in verdicts.read(here).items() if key not in known}
        lost = {one.op for one in known.values() if one.kind in (CRASHED, HUNG)}
        outcome = _run([item for item in items if item.key not in known and item.op not in lost], device, run)
        known |= outcome.verdicts
        unkept = verdicts.write(here, outcome.verdicts) if outcome.verdicts else ""
        condemned = {one.op: one for one in known.values() if one.kind in UNTRUSTED}
        each = (known.get(item.key) or condemned.get(item.op) or verdict(item, UNCHECKED) for item in items)
        found = Findings(tuple(each), outcome.general, outcome.obstacle, len(outcome.verdicts), unkept)
        _bar(found, device)
    return found


def _start_anew(known: dict[str, Verdict], device: torch.device) -> None:
    """Forget what was found on a device before."""
    known.clear()
    guard.allow(device)
    _ended.pop(device, None)
    _said.difference_update([one for one in _said if one[0] == device])


def _run(
    waiting: Sequence[Item], device: torch.device, run: Callable[[Sequence[Item], torch.device], Outcome]
) -> Outcome:
    """What a check of the waiting items finds; nothing where there is none, or this process may start no other."""
    if not waiting or multiprocessing.current_process().daemon:
        return Outcome()
    if device in _ended:
        return Outcome({}, _ended[device].general, _ended[device].obstacle)
    obstacle = children.obstacle()
    logger.info(f"checking {len(waiting)} kernel launches on {device}, once; {SWITCH}=0 leaves it out")
    outcome = Outcome(obstacle=obstacle) if obstacle else run(waiting, device)
    if outcome.general or outcome.obstacle:
        _ended[device] = outcome
    return outcome


def _bar(found: Findings, device: torch.device) -> None:
    if found.general:
        guard.bar_known(guard.EVERYTHING, device)
    for one in found.barred:
        guard.bar_known(one.op, device, guard.EVERY_VARIANT if one.kind in UNTRUSTED else one.variant)


def _report(found: Findings, device: torch.device, gpu: str) -> None:
    """One notice of everything."""
    if found.general:
        _say(device, f"kernels cannot be used on {gpu}: {found.general}. PyTorch computes instead, slower")
        return
    if found.barred:
        first = "; ".join(map(str, found.barred[:SHOWN]))
        more = f"; and {len(found.barred) - SHOWN} more" if len(found.barred) > SHOWN else ""
        _say(
            device,
            f"the self-check found kernels that fail on {gpu}: {first}{more}. PyTorch computes these operators "
            f"instead, slower. {guard.REPORT} {SWITCH}=always checks again",
        )
    if found.obstacle:
        _say(device, f"the kernels could not all be checked on {gpu}: {found.obstacle}. They are used unchecked")
    elif found.unkept:
        _say(
            device,
            f"the self-check's verdicts cannot be kept in {verdicts.folder()}: {found.unkept}. Make it writable, or "
            f"name another folder in {verdicts.FOLDER}",
        )


def _say(device: torch.device, message: str) -> None:
    """Log a message once per device and process."""
    if (device, message) not in _said:
        _said.add((device, message))
        logger.warning(message)


def forget() -> None:
    """Drop what this process knows: for tests."""
    with _lock:
        _found.clear()
        _ended.clear()
        _said.clear()
