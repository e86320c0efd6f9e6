"""Figures of mask learning. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt

from model.compress.masks.learner import History
from model.compress.masks.objectives import GROUP
from model.compress.masks.proof import Proof

matplotlib.use("Agg")
KEPT, GONE = "#1f5fa8", "#e9edf2"


def training(history: History, path: Path) -> None:
    """Probabilities over the steps of one run: p of every group, q of every pair, pi of every block."""
    rows = (history.groups, history.transfers, history.marginals)
    p, q, pi = (torch.stack(part).cpu().numpy() for part in rows)  # [T,K,C], [T,K-1,2r+1], [T,N]
    number, reach = p.shape[1], q.shape[2] // 2
    columns = min(4, number)
    lines, pairs = -(-number // columns), -(-max(1, number - 1) // columns) if reach else 0
    figure = plt.figure(figsize=(3.2 * columns, 2.1 * (lines + pairs) + 2.6), layout="constrained")
    grid = figure.add_gridspec(lines + pairs + 1, columns, height_ratios=[1] * (lines + pairs) + [1.2])
    for j in range(number):
        axes = figure.add_subplot(grid[j // columns, j % columns])
        axes.plot(history.steps, p[:, j], linewidth=1)
        _label(axes, f"p(m), group {j + 1}")
    for j in range(number - 1 if reach else 0):
        axes = figure.add_subplot(grid[lines + j // columns, j % columns])
        for change in range(-reach, reach + 1):
            axes.plot(history.steps, q[:, j, change + reach], linewidth=1, label=f"{change:+d}" if change else "0")
        axes.legend(fontsize=7, title=f"blocks to group {j + 1}", title_fontsize=7)
        _label(axes, f"q(t), groups {j + 1} and {j + 2}")
    axes = figure.add_subplot(grid[-1, :])
    extent = (history.steps[0], history.steps[-1], pi.shape[1] + 0.5, 0.5)
    image = axes.imshow(pi.T, aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axes.set(ylabel="block", xlabel="step", title="marginals pi")
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def kept(proofs: Sequence[Proof], path: Path, seed: int = 0) -> None:
    """Which blocks every method keeps of the first objective of each family, and the place of its mask."""
    figure, panels = plt.subplots(len(proofs), 1, figsize=(6.4, 1.9 * len(proofs)), layout="constrained", squeeze=False)
    for proof, axes in zip(proofs, panels[:, 0], strict=True):
        masks = {"best of all": proof.optimal[seed]} | {m: o.masks[seed] for m, o in proof.outcomes.items()}
        for y, mask in enumerate(masks.values()):
            colors = [KEPT if entry else GONE for entry in mask]
            axes.barh([y] * len(mask), 0.9, left=[i + 0.55 for i in range(len(mask))], height=0.8, color=colors)
        for y, method in enumerate(masks):
            place = 1 if y == 0 else proof.outcomes[method].ranks[seed]
            axes.text(len(proof.optimal[seed]) + 0.7, y, f"place {place}", va="center", fontsize=7)
        for edge in range(GROUP, len(proof.optimal[seed]), GROUP):
            axes.axvline(edge + 0.5, color="black", linewidth=0.8)
        axes.set(xlim=(0.4, len(proof.optimal[seed]) + 2.2), xticks=range(1, len(proof.optimal[seed]) + 1))
        axes.set_yticks(range(len(masks)), list(masks), fontsize=7)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(f"{proof.family}, seed {proof.seeds[seed]}", fontsize=9)
        axes.spines[:].set_visible(False)
    _save(figure, path)


def ranks(proofs: Sequence[Proof], path: Path) -> None:
    """The share of seeds whose mask is at a place or a better one, of every method in every family."""
    figure, panels = plt.subplots(
        1, len(proofs), figsize=(2.6 * len(proofs), 3.1), layout="constrained", sharey=True, squeeze=False
    )
    methods = list(dict.fromkeys(method for proof in proofs for method in proof.outcomes))
    for proof, axes in zip(proofs, panels[0], strict=True):
        for number, method in enumerate(methods):
            if method in proof.outcomes:
                places = sorted(proof.outcomes[method].ranks)
                share = [(i + 1) / len(places) for i in range(len(places))]
                axes.step([1, *places, 924], [0, *share, 1], where="post", label=method, color=f"C{number}")
        axes.axvline(proof.best, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlim=(1, 924), ylim=(0, 1.02), title=proof.family, xlabel="place of 924")
    panels[0][0].set_ylabel("share of seeds")
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    _save(figure, path)


def _label(axes: Any, title: str) -> None:
    axes.set_ylim(0, 1.02)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)


def _save(figure: Any, path: Path) -> None:
    """Write a PNG; without the library's version in it, so that the same figure is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
