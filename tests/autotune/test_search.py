"""What the tuner finds on simulated devices, whatever they do."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import pytest

from autotune.items.answers import Failure, Sample
from autotune.items.candidates import Candidate
from autotune.items.device import Entries
from autotune.items.log import Log
from autotune.items.work import Item, Target
from autotune.search import tuning
from autotune.search.search import CHUNK, DUEL, Race, contest, search, start
from autotune.search.session import RETAKES, Failed, Session
from autotune.search.tuning import Outcome, tune
from tests.autotune.simulated import (
    CALM,
    FACTS,
    ITEMS,
    OP,
    TARGET,
    Odds,
    SimulatedDevice,
    candidates_of,
)
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.device import GPUS

RUNS = 200
BUDGET = 120.0
"""Seconds of the simulated device; to try every candidate takes about 160."""


@pytest.fixture(autouse=True)
def _candidates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates do not depend on the seed: make them once for all runs."""
    monkeypatch.setattr(tuning, "candidates", lambda item, gpu, incumbent: candidates_of(item.key))


def run(device: SimulatedDevice, file: Path, budget: float = BUDGET) -> Outcome:
    file.unlink(missing_ok=True)
    configs.forget()
    return tune([TARGET], ITEMS, device, file, budget=budget)


def slower_than_best(device: SimulatedDevice, outcome: Outcome) -> float:
    """The worst of the items: its time over that of the best candidate there is."""
    return max(device.true_us(race.item, race.champion) / device.best_us(race.item) for race in outcome.races)


def whole_us(device: SimulatedDevice, outcome: Outcome, which: str) -> float:
    times = {
        "before": lambda race: device.true_us(race.item, race.candidates.incumbent),
        "after": lambda race: device.true_us(race.item, race.champion),
        "best": lambda race: device.best_us(race.item),
    }
    return sum(race.item.calls * times[which](race) for race in outcome.races)


def test_200_simulated_runs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every item within 3 % of its best in 95 % of the runs, within the budget, and never a wrong result."""
    ratios, gains, spent, tried = [], [], [], []
    removed: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for seed in range(RUNS):
        device = SimulatedDevice(seed)
        outcome = run(device, file)
        assert not any(device.is_wrong(race.item, race.champion) for race in outcome.races), seed
        assert not any(device.fate(race.item, race.champion) for race in outcome.races), seed
        assert whole_us(device, outcome, "after") <= whole_us(device, outcome, "before"), seed
        # One step may overrun, by a hang of 20 seconds at the most; and the models end to end take three seconds.
        assert outcome.spent <= BUDGET + 25, seed
        ratios.append(slower_than_best(device, outcome))
        gains.append(whole_us(device, outcome, "before") / whole_us(device, outcome, "after"))
        spent.append(outcome.spent)
        everything = sum(len(race.candidates.all) for race in outcome.races)
        tried.append(1 - sum(len(race.raw) + len(race.rivals) for race in outcome.races) / everything)
        removed.update(sum((race.removed for race in outcome.races), Counter()))
        counts.update(outcome.counts)
    good = sum(ratio <= 1.03 for ratio in ratios)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{RUNS} simulated runs: {good / RUNS:.1%} within 3 % of the best in every item, worst {max(ratios):.3f} "
            f"times the best; {mean(gains):.2f} times faster on average; {mean(tried):.0%} of the candidates tried in "
            f"{mean(spent):.0f} s of {BUDGET:.0f} s (most: {max(spent):.0f} s); {counts['samples']} readings, "
            f"{counts['retaken']} taken again; removed: {dict(removed.most_common())}\n"
        )
    assert good >= 0.95 * RUNS
    assert set(removed) >= {"wrong", "crash", "timeout", "error", "spills registers"}


def test_a_calm_device_is_tuned_to_the_best(file: Path) -> None:
    """Without mishaps and with time enough, nothing but noise is between the outcome and the best."""
    device = SimulatedDevice(7, CALM)
    outcome = run(device, file, 1e6)
    assert slower_than_best(device, outcome) <= 1.01
    assert all(race.done for race in outcome.races)
    assert outcome.kept
    for race in outcome.races:
        config = race.champion.config
        choice = race.item.call.choose(GPUS[90])
        assert (choice.config, choice.source) == (config, str(file))
        assert choice.entry is not None
        assert choice.entry.time_us == pytest.approx(device.true_us(race.item, race.champion), rel=0.02)
        assert choice.entry.candidates == len(race.candidates.all)


def test_what_lies_in_the_file_is_the_next_incumbent(file: Path) -> None:
    device = SimulatedDevice(7, CALM)
    found = {race.item.key: race.champion.config for race in run(device, file, 1e6).races}
    again = tune([TARGET], ITEMS, SimulatedDevice(8, CALM), file, budget=40)
    # candidates_of gives the heuristic as the incumbent whatever is chosen; ask the choice itself.
    for race in again.races:
        choice = race.item.call.choose(GPUS[90])
        assert choice.config in (found[race.item.key], race.champion.config)


def test_little_budget_goes_where_the_time_is(file: Path) -> None:
    """A run that can afford one batch gives it to the item that holds most of the time."""
    outcome = run(SimulatedDevice(1, CALM), file, 5)
    shares = {race.item.key: race.item.calls * race.floor_us for race in outcome.races}
    raced = [race.item.key for race in outcome.races if race.batches]
    assert raced == [max(shares, key=lambda key: shares[key])]


class Level(SimulatedDevice):
    """Every candidate takes the same time: only noise tells them apart."""

    def true_us(self, item: Item, candidate: Candidate) -> float:
        return 10.0


def test_the_incumbent_stays_unless_beaten_by_more_than_noise(file: Path) -> None:
    takeovers = 0
    for seed in range(10):
        device = Level(seed, replace(CALM, noise=0.05))
        takeovers += sum(race.won for race in run(device, file, 1e6).races)
    # 10 runs x 3 items x 10 batches of which each lets one rival try, at less than 1 %.
    assert takeovers <= 6


def test_nothing_is_kept_unless_whole_models_win(file: Path) -> None:
    class Slower(SimulatedDevice):
        """Faster launches make this model slower."""

        def whole(self, target: Target, entries: Entries, pdl: bool) -> Sample | Failure:
            return self._reading(110.0 if entries else 100.0, "whole", str(entries))

    class Same(SimulatedDevice):
        def whole(self, target: Target, entries: Entries, pdl: bool) -> Sample | Failure:
            return self._reading(100.0, "whole", str(entries))

    class Fails(SimulatedDevice):
        def whole(self, target: Target, entries: Entries, pdl: bool) -> Sample | Failure:
            return Failure("crash", "signal 9")

    for kind, reason in ((Slower, "slower"), (Same, "noise"), (Fails, "could not be timed")):
        outcome = run(kind(3, CALM), file)
        assert any(race.won for race in outcome.races)
        assert not outcome.kept
        assert reason in outcome.why
        assert not file.exists()


def test_programmatic_dependent_launch_where_models_win(file: Path) -> None:
    """On where that is faster by more than noise, off again where it no longer is; entries stay as they are."""
    device = SimulatedDevice(3, CALM, pdl_factor=0.9)
    outcome = run(device, file)
    assert outcome.kept
    assert outcome.pdl
    assert outcome.written
    assert configs.pdl(GPUS[90])
    assert [(whole.target, whole.outcome) for whole in outcome.pdl_wholes] == [(TARGET, 1)]
    assert outcome.pdl_wholes[0].after_us == pytest.approx(0.9 * outcome.pdl_wholes[0].before_us, rel=0.02)
    entries = config_file.read(file)[0]["operations"]
    for factor, expected in ((1.0, True), (1.1, False)):
        again = tune([TARGET], [], SimulatedDevice(4, CALM, pdl_factor=factor), file, budget=20)
        assert not again.kept
        assert again.written == (not expected)
        assert again.pdl == configs.pdl(GPUS[90]) == expected
        assert config_file.read(file)[0]["operations"] == entries
    outcome = run(SimulatedDevice(3, CALM, pdl_factor=1.1), file)
    assert not outcome.pdl
    assert not configs.pdl(GPUS[90])


def test_older_cards_know_no_programmatic_dependent_launch(file: Path) -> None:
    facts = replace(FACTS, gpu=GPUS[80])
    outcome = tune([TARGET], [], SimulatedDevice(3, CALM, facts=facts, pdl_factor=0.5), file, budget=20)
    assert not outcome.pdl
    assert not outcome.pdl_wholes
    assert not outcome.written


def test_a_broken_incumbent_is_replaced(file: Path) -> None:
    """Where what runs today fails, the best that works takes its place without a contest."""

    class Broken(SimulatedDevice):
        def _fate(self, item: Item, candidate: Candidate) -> str:
            if candidate.config == item.call.heuristic(GPUS[90]):
                return "wrong"
            return ""

    device = Broken(5, CALM)
    outcome = run(device, file, 1e6)
    for race in outcome.races:
        assert race.won
        assert not device.is_wrong(race.item, race.champion)
        assert device.true_us(race.item, race.champion) <= 1.05 * device.best_us(race.item)


def test_what_fails_after_it_won_is_dropped(file: Path) -> None:
    """The incumbent runs again where the champion breaks later."""

    class Breaks(SimulatedDevice):
        def sample(self, item: Item, candidate: Candidate) -> Sample | Failure:
            incumbent = candidate.config == item.call.heuristic(GPUS[90])
            if not incumbent and self.asked[item.key, candidate.key] >= 60:
                return Failure("error", "illegal memory access")
            return super().sample(item, candidate)

    device = Breaks(2, CALM)
    outcome = run(device, file, 1e6)
    assert any(f.kind == "error" for race in outcome.races for _, f in race.failures)
    for race in outcome.races:
        assert not race.is_out(race.champion)


def test_disturbed_readings_are_taken_again() -> None:
    """After waiting longer each time, and in the end kept as they are."""

    class Disturbed(SimulatedDevice):
        waits: list[float]
        until = 3

        def sample(self, item: Item, candidate: Candidate) -> Sample | Failure:
            self.asked["n"] += 1
            return Sample(10.0 + self.asked["n"], "thermal slowdown" if self.asked["n"] <= self.until else "", 1500)

        def wait(self, seconds: float) -> None:
            self.waits.append(seconds)

    device = Disturbed(0)
    device.waits = []
    session = Session(device, Log())
    item, candidate = ITEMS[0], candidates_of(ITEMS[0].key).incumbent
    assert session.sample(item, candidate) == 14.0
    assert device.waits == [1, 2, 4]
    assert session.counts["retaken"] == 3
    device.until = 1000
    assert session.sample(item, candidate) == 14.0 + RETAKES + 1
    assert session.counts["still disturbed"] == 1


def test_a_lasting_disturbance_does_not_cost_the_budget() -> None:
    """Once waiting was in vain, each further reading is taken again once, until one is undisturbed; and nothing is
    waited for beyond the budget."""

    class Disturbed(SimulatedDevice):
        lasting = True

        def sample(self, item: Item, candidate: Candidate) -> Sample | Failure:
            self.asked["n"] += 1
            self.now += 0.1
            return Sample(10.0, "another process on the GPU" if self.lasting else "")

    def asked(session: Session) -> int:
        before = device.asked["n"]
        session.sample(item, candidate)
        return device.asked["n"] - before

    device = Disturbed(0)
    item, candidate = ITEMS[0], candidates_of(ITEMS[0].key).incumbent
    session = Session(device, Log())
    assert [asked(session) for _ in range(4)] == [1 + RETAKES, 2, 2, 2]
    device.lasting = False
    assert asked(session) == 1
    device.lasting = True
    assert asked(session) == 1 + RETAKES
    short = Session(device, Log(), budget=5.0)
    assert asked(short) == 3  # after 1 and 2 seconds; 4 more would be too many
    assert short.spent < 5.0


def test_a_failure_is_remembered() -> None:
    """What failed once is not asked again."""
    device = SimulatedDevice(0, Odds(hang=1, spill=0, wrong=0, wrong_sometimes=0, crash=0))
    session = Session(device, Log())
    item, candidate = ITEMS[0], candidates_of(ITEMS[0].key).all[1]
    for _ in range(3):
        with pytest.raises(Failed, match="timeout: 20 s"):
            session.check(item, candidate)
    with pytest.raises(Failed):
        session.sample(item, candidate)
    assert device.asked["checks"] == 1
    assert session.spent == 20


def test_contests() -> None:
    """Decided by wins alone; a tie decides nothing, and whoever is beaten early need not go on."""

    def fixed(*times: float) -> tuple[int, int]:
        asked = []
        outcome = contest(lambda which: (asked.append(which), times[which])[1], give_up=True)
        return outcome, len(asked)

    assert fixed(2.0, 1.0) == (1, 16)
    assert fixed(1.0, 2.0) == (-1, 16)
    assert fixed(1.0, 1.0) == (-1, 16)
    assert fixed(math.inf, 1.0) == (1, 16)
    alternating = iter([1.0, 2.0] * 100)
    assert contest(lambda which: next(alternating), give_up=True) == 0


def test_luck_rarely_wins_a_contest() -> None:
    """The chance of so many wins between equals, summed over the stages, stays below 1 %."""
    total = sum(sum(math.comb(n, k) for k in range(needed, n + 1)) / 2**n for n, needed in DUEL)
    assert total < 0.01


def test_candidates_are_compiled_in_chunks_and_raced_in_the_models_order() -> None:
    device = SimulatedDevice(0, CALM)
    race = start(ITEMS[0], candidates_of(ITEMS[0].key), device)
    assert race.raw[0].library
    session = Session(device, Log())
    heard: list[Race] = []
    search([race], session, 5.0, heard.append)
    assert heard
    assert device.asked["builds"] == CHUNK
    assert median(race.readings[race.champion.key]) == race.champion_us


def test_sources_are_the_files_own(file: Path) -> None:
    """Entries carry the hashes of the operation they were measured on."""
    run(SimulatedDevice(7, CALM), file, 1e6)
    content, _ = config_file.read(file)
    assert content["operations"][OP]["kernel_hash"] == config_file.kernel_hash(type(ITEMS[0].call))
    assert content["device"]["name"] == "NVIDIA H200"
    assert content["driver"] == "570.10"
