"""The proof at small scale: the objectives are what they claim, and the learner meets its bar on them."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.compress.__main__ import main
from model.compress.masks import proof, proof_results
from model.compress.masks.decide import number_reachable
from model.compress.masks.objectives import FAMILIES, Network, Pairwise, all_masks, best_share, draw
from tests import ROOT


@functools.cache
def proved(family: str) -> proof.Proof:
    return proof.prove(family, methods=("learned", "fixed groups"))


def least_of(seeds: int, share: float, chance: float) -> int:
    """The number of seeds that fewer than which meet a bar with less than this chance, where `share` do on average."""
    below = 0.0
    for count in range(seeds + 1):
        below += math.comb(seeds, count) * share**count * (1 - share) ** (seeds - count)
        if below >= chance:
            return count
    return seeds


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_learner_ends_within_the_best_percent(family: str) -> None:
    """Where no fixed grouping reaches the best 1 %, fixed groups never do.

    Rounding decides where some seeds end, and differs between processors. So a family may fall short of the bar of 80 %
    by what chance does more often than once in a hundred thousand draws of its seeds. All families together must meet
    the bar, and so must each in the committed results.
    """
    found = proved(family)
    assert len(found.outcomes["learned"].ranks) == 50
    assert found.best == 9
    assert sum(rank <= 9 for rank in found.outcomes["learned"].ranks) >= least_of(50, proof.BAR, 1e-5)
    if family in ("unbalanced", "lopsided"):
        assert found.unreachable == 50
        assert found.outcomes["fixed groups"].within(found.best) == 0


@pytest.mark.long
def test_learner_meets_its_bar() -> None:
    """In 80 % of the 250 seeds: 90 % do, which is five standard errors above."""
    within = [proved(family).outcomes["learned"].within(9) for family in FAMILIES]
    assert sum(within) / len(within) >= proof.BAR, within


def test_chances_of_counts() -> None:
    assert least_of(50, 0.8, 1e-5) == 27
    assert least_of(1, 0.5, 0.4) == 0
    assert least_of(1, 0.5, 0.6) == 1


def test_all_masks_and_the_best_of_them() -> None:
    masks = all_masks()
    assert masks.shape == (924, 12)
    assert len({tuple(row) for row in masks.tolist()}) == 924
    assert (masks.sum(-1) == 6).all()
    assert best_share(924) == 9


def test_network_tries_masks_one_by_one_to_the_same_values() -> None:
    """The exact values share work between masks; block after block in float64 they are the same."""
    network = draw("network", [3, 4])
    assert isinstance(network, Network)
    masks = all_masks()[::100]
    found = network.exact(masks)

    def output(run: int, mask: Tensor) -> Tensor:
        x = network.inputs[run].double()
        for i in mask.nonzero().flatten().tolist():
            x = x + (x @ network.inner[run, i].double()).tanh() @ network.outer[run, i].double()
        return x

    for run in range(2):
        whole = output(run, torch.ones(12))
        expected = torch.stack([(output(run, mask) - whole).abs().mean() for mask in masks])
        torch.testing.assert_close(found[run].double(), expected, rtol=1e-5, atol=0)


def test_pairwise_values() -> None:
    objective = draw("pairwise", [5])
    assert isinstance(objective, Pairwise)
    mask = all_masks()[77]
    kept = mask.nonzero().flatten().tolist()
    expected = sum(float(objective.interaction[0, i, j]) for i in kept for j in kept if i < j)
    expected -= sum(float(objective.value[0, i]) for i in kept)
    assert objective.exact(mask[None]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_noisy_and_right_on_average(family: str) -> None:
    objective = draw(family, [7])
    masks = all_masks()[::231]
    generator = torch.Generator().manual_seed(0)
    batches = torch.stack([objective.noisy(masks[None], generator)[0] for _ in range(2000)])
    assert (batches.std(0) > 0).all()
    bound = 5 * batches.std(0) / len(batches) ** 0.5  # five standard errors
    assert ((batches.mean(0) - objective.exact(masks)[0]).abs() <= bound).all()


def test_lopsided_means_a_group_whole_or_gone() -> None:
    values = draw("lopsided", range(5)).exact(all_masks())
    counts = all_masks()[values.argmin(-1)].unflatten(-1, (3, 4)).sum(-1)
    assert ((counts == 0) | (counts == 4)).any(-1).all()


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="unknown family"):
        draw("easy", [0])
    with pytest.raises(ValueError, match="unknown method"):
        proof.prove("pairwise", [0], methods=["oracle"])


def test_command_writes_results_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["masks-proof", "--seeds", "2", "--steps", "30", "--out", str(tmp_path)])
    assert "lopsided: 2 of 2 out of reach of fixed groups" in capsys.readouterr().out
    written = json.loads((tmp_path / "masks-proof.json").read_text())
    assert list(written["families"]) == list(FAMILIES)
    assert "similarity" in written["families"]["network"]["methods"]
    for family in written["families"].values():
        for method in family["methods"].values():
            assert all(len(mask) == 12 and mask.count("1") == 6 for mask in method["masks"])
            assert method["within"] == sum(rank <= 9 for rank in method["ranks"]) / 2
    assert written["schedule"]["steps"] == 30
    pytest.importorskip("matplotlib")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"masks-proof.json", "masks-kept.png", "masks-ranks.png", "masks-training.png"}


def test_committed_results_are_of_the_code_as_it_is() -> None:
    written = json.loads((ROOT / "docs/compression/masks-proof.json").read_text())
    assert written["schedule"] == proof_results.results([])["schedule"]
    assert written["bar"] == proof.BAR
    for family in FAMILIES:
        assert written["families"][family]["seeds"] == [0, 49]
        assert written["families"][family]["methods"]["learned"]["within"] >= proof.BAR
        assert written["families"][family]["methods"]["learned"]["within"] >= proof.BAR


def test_the_document_shows_the_committed_results() -> None:
    folder = ROOT / "docs/compression"
    families = json.loads((folder / "masks-proof.json").read_text())["families"].values()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (folder / "masks.md").read_text().splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == len(FAMILIES) + 1}
    for method in (*proof.LEARNERS, *proof.OTHERS):
        shares = [family["methods"][method]["within"] if method in family["methods"] else None for family in families]
        assert table[method] == ["" if share is None else f"{share:.0%}" for share in shares]
    assert all(f"{number_reachable(24, 4, 2, reach):,}" in (folder / "masks.md").read_text() for reach in (0, 1, 2))


def test_command_needs_seeds_and_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["masks-proof", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "at least one" in capsys.readouterr().err
