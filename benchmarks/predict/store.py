"""Predictions by digest: what was predicted once is not predicted again while kernel, grid, GPU and model are the same.

benchmarks/results/predicted-launches.json holds one per line. Its keys hash the variant (the kernels' source among it),
the grid and the arguments, the machine's constants, the version of Triton, and the source of the model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.predict.cubins import triton_version
from benchmarks.predict.cycles.machines import Machine
from benchmarks.predict.cycles.sm import NoCompiler
from benchmarks.predict.emulate.disassembly import UnknownCode
from benchmarks.predict.execution import OutOfBounds
from benchmarks.predict.launches import Program
from benchmarks.predict.model import Prediction, predict
from tinysr_kernels.launch.json_file import BadFile, read_json

RESULTS = Path(__file__).parents[1] / "results"
LAUNCHES = RESULTS / "predicted-launches.json"
LARGEST_FILE = 64 << 20
KEEP_EVERY = 20
"""Predictions between two times that they are stored."""
FAILURES = (OutOfBounds, UnknownCode, RuntimeError, ValueError)


@dataclass(frozen=True)
class Job:
    """One prediction to make."""

    program: Program
    machine: Machine

    @functools.cached_property
    def key(self) -> str:
        """Equal for jobs that get the same prediction."""
        constants = dataclasses.asdict(self.machine)
        constants["card"] = self.machine.card.name
        text = repr((self.program.digest, sorted(constants.items()), triton_version(), model_digest()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def model_digest() -> str:
    """Hash of the source that decides a prediction: that of emulate/ and cycles/, and of the modules named here."""
    here = Path(__file__).parent
    sources = [here / f"{name}.py" for name in ("execution", "model")]
    for folder in ("emulate", "cycles"):
        sources += sorted(path for path in (here / folder).iterdir() if path.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def predict_all(
    jobs: Iterable[Job],
    stored: Mapping[str, Prediction],
    workers: int,
    keep: Callable[[Mapping[str, Prediction]], None] | None = None,
) -> dict[str, Prediction | str]:
    """The prediction of every job by key: the stored one, or a new one; a text for one that fails.

    keep: called from time to time with all predictions so far, so that little is lost when the run is interrupted.
    """
    missing = {job.key: job for job in jobs if job.key not in stored}
    made: dict[str, Prediction | str] = dict(stored)
    if not missing:
        return made
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context, initializer=_start_worker) as pool:
        for n, (key, found) in enumerate(zip(missing, pool.map(_predict, missing.values()), strict=True), start=1):
            made[key] = found
            if keep and (n % KEEP_EVERY == 0 or n == len(missing)):
                keep({one: prediction for one, prediction in made.items() if not isinstance(prediction, str)})
            if sys.stderr.isatty():
                print(f"{n} of {len(missing)} predicted", end="\n" if n == len(missing) else "\r", file=sys.stderr)
    return made


def _start_worker() -> None:
    """Set up a worker before it imports Triton, which must compile there, not interpret."""
    os.environ["TRITON_INTERPRET"] = "0"


def _predict(job: Job) -> Prediction | str:
    try:
        return predict(job.program, job.machine)
    except NoCompiler:
        raise
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"


def read(path: Path = LAUNCHES) -> dict[str, Prediction]:
    """The stored predictions; none if there is no file, or if it is of another form, which is said on stderr."""
    names = {field.name for field in dataclasses.fields(Prediction)}
    try:
        entries = read_json(path, LARGEST_FILE)
        if not isinstance(entries, dict) or not all(isinstance(e, dict) and set(e) == names for e in entries.values()):
            raise BadFile("holds no predictions by digest")
    except FileNotFoundError:
        return {}
    except BadFile as error:
        print(f"{path} {error}; nothing of it is used", file=sys.stderr)
        return {}
    return {key: Prediction(**entry) for key, entry in entries.items()}


def write(predictions: Mapping[str, Prediction], path: Path = LAUNCHES) -> None:
    """One prediction per line, in the order of the keys."""
    lines = (f'"{key}": {json.dumps(_rounded(dataclasses.asdict(one)))}' for key, one in sorted(predictions.items()))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def keep_only(keys: Collection[str]) -> None:
    """Remove the stored predictions with other keys: of kernels, or of a model, that are gone."""
    write({key: one for key, one in read().items() if key in keys})


def _rounded(value: Any) -> Any:
    """Four decimals are far more than the model is good for."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value
