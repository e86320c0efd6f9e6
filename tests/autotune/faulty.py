"""What the workers of the tests hold: it does as it is told, and breaks in every way there is."""

import os
import signal
import sys
import time

from autotune.device.worker import Broken


class Clumsy:
    """Counts, and fails."""

    def __init__(self, start: int = 0) -> None:
        self.calls = start

    def add(self, n: int) -> int:
        self.calls += n
        return self.calls

    def fail(self, kind: str) -> None:
        sys.stderr.write("on the way out\n")
        sys.stderr.flush()
        if kind == "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif kind == "exit":
            os._exit(3)
        elif kind == "hang":
            time.sleep(600)
        elif kind == "broken":
            raise Broken("an illegal memory access was encountered")
        raise ValueError("this one is no good")
