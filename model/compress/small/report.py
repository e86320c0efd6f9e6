"""Report of the small run: results.json, RESULTS.md and plots."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.compress import count
from model.compress.count import Table
from model.compress.mask_stage import read_history
from model.compress.released import write_json
from model.demo import degrade, evaluate
from model.demo.evaluate import ImageArray, Result

TARGET_GAP, TARGET_SHARE = 0.5, 80.0


@dataclass
class Outcome:
    """Results of teacher and students by name, squares for the comparison, sizes, masks, seconds per stage."""

    results: dict[str, list[Result]]
    details: dict[str, list[list[ImageArray]]]
    sizes: dict[str, Table]
    masks: dict[str, str]
    seconds: dict[str, float]


def figures(outcome: Outcome) -> dict[str, Any]:
    """results.json: means, gaps to the teacher, sizes and the stages' processor time."""
    means = {name: evaluate.means(results) for name, results in outcome.results.items()}
    base = count.total(outcome.sizes["teacher"])
    rows = {}
    for name, mean in means.items():
        own = count.total(outcome.sizes[name])
        rows[name] = {
            "mask": outcome.masks.get(name),
            "psnr": mean["psnr"],
            "ssim": mean["ssim"],
            "bicubic_psnr": mean["bicubic_psnr"],
            "below_teacher_db": means["teacher"]["psnr"] - mean["psnr"],
            "parameters": own.parameters,
            "macs": own.macs,
            "parameters_gone_percent": 100 * (1 - own.parameters / base.parameters),
            "macs_gone_percent": 100 * (1 - own.macs / base.macs),
        }
    photographs = {name: [asdict(r) for r in results] for name, results in outcome.results.items()}
    sizes = {name: {k: asdict(v) for k, v in table.items()} for name, table in outcome.sizes.items()}
    return {"means": rows, "photographs": photographs, "sizes": sizes, "seconds": outcome.seconds}


def markdown(outcome: Outcome) -> str:
    """RESULTS.md."""
    found = figures(outcome)
    rows, seconds = found["means"], outcome.seconds
    lines = [
        "| network | mask | parameters | gone | MACs | gone | PSNR | below the teacher | SSIM |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| bicubic | | | | | | {rows['teacher']['bicubic_psnr']:.2f} | | |",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name if name == 'teacher' else f'student, {name} mask'} | {row['mask'] or ''} "
            f"| {row['parameters'] / 1e6:.2f} M | {row['parameters_gone_percent']:.1f} % "
            f"| {row['macs'] / 1e6:.0f} M | {row['macs_gone_percent']:.1f} % "
            f"| {row['psnr']:.2f} | {row['below_teacher_db']:+.2f} dB | {row['ssim']:.4f} |"
        )
    first = next(iter(outcome.masks))
    own = rows[first]
    met = own["below_teacher_db"] <= TARGET_GAP
    small = min(own["parameters_gone_percent"], own["macs_gone_percent"]) >= TARGET_SHARE
    return (
        "# The small run\n\n"
        "A teacher of SD3's architecture trained on procedural images, compressed by the recipe, and measured on\n"
        "the photographs of scikit-image, on which no stage was trained. Written by `python -m model.compress small`.\n"
        f"Each photograph was degraded with a fixed seed: {evaluate.describe(degrade.EVALUATION)}.\n"
        "PSNR (dB) and SSIM over RGB against the original, without color fix; the students run through\n"
        "`tinysr_kernels.compile` from the released layout, the teacher in plain PyTorch. MACs are of one window.\n\n"
        + "\n".join(lines)
        + f"\n\nWithin {TARGET_GAP} dB of the teacher: {'yes' if met else 'no'} ({first} mask). At least "
        f"{TARGET_SHARE:.0f} % of parameters and MACs gone: {'yes' if small else 'no'}.\n\n"
        f"Teacher and student ({first} mask), for one window:\n\n"
        + count.markdown(outcome.sizes["teacher"], outcome.sizes[first])
        + "\n![low resolution, bicubic, teacher, students, original](comparison.png)\n\n"
        "![probability that a block is kept, over mask learning](masks.png)\n\n"
        "Processor time of the stages, one thread (without making the image pairs and encoding the latent pairs):\n\n"
        "| stage | seconds |\n|---|---:|\n"
        + "".join(f"| {name} | {value:.0f} |\n" for name, value in seconds.items())
        + f"| **all** | **{sum(seconds.values()):.0f}** |\n"
    )


def write_report(outcome: Outcome, out: Path) -> None:
    """Write everything into `out`; plots need matplotlib and are skipped without it."""
    write_json(out / "results.json", figures(outcome))
    (out / "RESULTS.md").write_text(markdown(outcome), encoding="utf-8")
    names = list(outcome.details)
    rows = []
    for number, (small, base, ours, original) in enumerate(outcome.details[names[0]]):
        rows.append([small, base, ours, *(outcome.details[n][number][2] for n in names[1:]), original])
    if rows:
        titles = ("low resolution", "bicubic", *names, "original")
        evaluate.comparison(rows[:4], titles, zoom=1).save(out / "comparison.png", optimize=True)
    draw_masks(out, outcome.masks)


def draw_masks(out: Path, masks: dict[str, str]) -> None:
    """masks.png: each block's probability over mask learning, and the blocks that every method keeps."""
    rows = read_history(out / "learned" / "masks.history.jsonl")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import patches, pyplot
    except ImportError:
        return
    if not rows:
        return
    learned = masks["learned"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), width_ratios=(3, 2), layout="constrained")
    colors = pyplot.get_cmap("turbo")
    number, steps = len(learned), [row["step"] for row in rows]
    for block in range(number):
        values = [row["marginals"][block] for row in rows]
        kept = learned[block] == "1"
        left.plot(steps, values, color=colors(block / number), lw=2 if kept else 1, ls="-" if kept else ":")
        left.annotate(str(block), (steps[-1], values[-1]), fontsize=8, color=colors(block / number))
    left.set(xlabel="step", ylabel="probability that the block is kept", title="mask learning (kept blocks solid)")
    for y, (name, mask) in enumerate(masks.items()):
        for block, bit in enumerate(mask):
            right.add_patch(patches.Rectangle((block + 0.05, y + 0.1), 0.9, 0.8, color="C0" if bit == "1" else "0.9"))
        right.text(-0.3, y + 0.5, name, ha="right", va="center")
    right.set(xlim=(0, number), ylim=(len(masks), 0), yticks=[], xlabel="block", title="blocks that stay")
    right.set_xticks([b + 0.5 for b in range(number)], [str(b) for b in range(number)])
    figure.savefig(out / "masks.png", dpi=110)
    pyplot.close(figure)
