"""The child's side of the self-check: runs each item's kernels twice on poisoned outputs and judges the results.

It reads one line of JSON from stdin (`supervise.py` writes it) and prints lines that begin with MARK. It ends when its
parent is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any, NoReturn

import torch

from tinysr_kernels.errors import shorten
from tinysr_kernels.first_use import items
from tinysr_kernels.first_use.correctness import Expected, check_results, expected_results
from tinysr_kernels.first_use.supervise import MARK, uuid_of
from tinysr_kernels.first_use.verdicts import CRASHED, FAILED, PASSED, UNCHECKED, WRONG
from tinysr_kernels.launch import configs, guard
from tinysr_kernels.launch.device import gpu_at
from tinysr_kernels.ops import Operator

LARGEST = 64 << 20
"""Bytes of a request."""
FACTOR = 4.0
"""Times eager's error that is allowed: twice the contract, as a false alarm costs a user's speed, and wrong code errs
by orders of magnitude."""


class Channel:
    """Messages to the parent."""

    def say(self, **message: Any) -> None:
        """One line, written at once and on a line of its own, whatever libraries print."""
        os.write(1, f"\n{MARK}{json.dumps(message)}\n".encode())


def main() -> None:
    """Check what stdin asks for."""
    channel = Channel()
    request = json.loads(sys.stdin.buffer.readline(LARGEST))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        device = _device(request["device"])
    except RuntimeError as error:
        channel.say(obstacle=shorten(error, 300))
        return
    # Eager PyTorch is what the results are held to: in true float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        for item in request["items"]:
            _check(channel, item["key"], item["call"], device)


def _exit_with_parent() -> NoReturn:
    while os.read(0, 4096):  # not through sys.stdin, whose lock would be held when Python ends
        pass
    os._exit(1)


def _device(where: dict[str, Any]) -> torch.device:
    """The device of the request. RuntimeError where this process does not see it."""
    if where["type"] != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # nothing else runs kernels there
        return torch.device(where["type"])
    indices = range(torch.cuda.device_count())
    same = [i for i in indices if where["uuid"] and uuid_of(torch.device("cuda", i)) == where["uuid"]]
    if not same and (where["uuid"] or where["index"] not in indices):
        raise RuntimeError(f"GPU {where['index']} is not visible in the process that checks")
    device = torch.device("cuda", same[0] if same else where["index"])
    torch.cuda.set_device(device)
    torch.zeros(1, dtype=torch.uint8, device=device)  # creates the context, or fails here
    return device


def _check(channel: Channel, key: str, data: dict[str, Any], device: torch.device) -> None:
    channel.say(begin=key)
    try:
        call = items.from_data(data)
        references = expected_results(call, device, 0)
    except Exception as error:  # noqa: BLE001  without a reference nothing can be said of the kernels
        _end_if_lost(channel, key, UNCHECKED, error, device)
        channel.say(verdict=key, kind=UNCHECKED, reason=_text(error))
        return
    channel.say(run=key)
    kind, reason = _judge(channel, key, call, references, device)
    channel.say(verdict=key, kind=kind, reason=reason)


def _judge(
    channel: Channel, key: str, call: Operator, references: list[Expected], device: torch.device
) -> tuple[str, str]:
    """The verdict on a call's kernels. Does not return where no kernel can be built, or the device is lost."""
    gpu = gpu_at(device)
    try:
        wrong = check_results(call.choose(gpu).config, references, factor=FACTOR, pdl=configs.pdl(gpu))
    except Exception as error:  # noqa: BLE001  whatever it is, a user's call would meet it too
        _end_if_lost(channel, key, CRASHED, error, device)
        if "out of memory" in str(error):
            return UNCHECKED, _text(error)
        found = guard.judge(error)
        if found is not None and found[0]:
            channel.say(general=f"{_text(error)}. {found[1]}")
            sys.exit(1)
        return FAILED, _text(error)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return (PASSED, "") if wrong is None else (WRONG, wrong)


def _end_if_lost(channel: Channel, key: str, kind: str, error: Exception, device: torch.device) -> None:
    """End the process with a verdict after an error that leaves the CUDA context useless."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        channel.say(verdict=key, kind=kind, reason=_text(error))
        os._exit(1)


def _text(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {str(error).strip()}", 300)


if __name__ == "__main__":
    main()
