"""A worker that compiles nothing: it dies, hangs or prints where a line says so, and writes the lines to a file."""

from __future__ import annotations

import json
import os
import sys
import time

sys.stdin.readline()
for line in sys.stdin:
    word = json.loads(line)
    if word == "die":
        os._exit(1)
    if word == "hang":
        time.sleep(3600)
    if word == "print":
        sys.stdout.write("good morning\n")
        sys.stdout.flush()
        time.sleep(0.1)
    with open(os.environ["SEEN"], "a", encoding="utf-8") as file:
        file.write(f"{word}\n")
    sys.stdout.write("compiled\n")
    sys.stdout.flush()
