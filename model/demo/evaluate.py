"""Measure a checkpoint on unseen photographs: `python -m model.demo.evaluate --ckpt demo --out docs/demo`.

Each photograph is degraded with the fixed preset of model/demo/degrade.py, seeded by its place in the list, then
enlarged four times by bicubic interpolation and by the network. Writes results.json, RESULTS.md and comparison.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional as F

from model.demo import degrade, photos

ImageArray = NDArray[np.uint8]
Enlarge = Callable[[ImageArray], ImageArray]
Strengths = dict[str, tuple[degrade.Degradation, dict[str, float]]]
"""Name of a strength of degradation -> the degradation and the mean figures under it."""

# Where the comparison looks: (photograph, top, left) of squares of 160 pixels of the original.
DETAILS = (
    ("astronaut", 60, 150),
    ("coffee", 90, 150),
    ("chelsea", 70, 140),
    ("rocket", 200, 180),
    ("stereo_motorcycle", 200, 150),
    ("camera", 80, 180),
)
DETAIL = 160


@dataclass(frozen=True)
class Result:
    """Quality of both enlargements of one photograph: PSNR in dB over RGB, SSIM over RGB channels."""

    photograph: str
    size: tuple[int, int]
    bicubic_psnr: float
    psnr: float
    bicubic_ssim: float
    ssim: float


def degraded(name: str, how: degrade.Degradation) -> tuple[ImageArray, ImageArray]:
    """The photograph [4H,4W,3] and its degraded quarter [H,W,3]."""
    original = photos.photograph(name)
    rng = np.random.default_rng([20, photos.NAMES.index(name)])
    small = degrade.degrade(original.astype(np.float32) / np.float32(255), how, rng)
    return original, np.round(small * 255).astype(np.uint8)


def bicubic(small: ImageArray) -> ImageArray:
    """[H,W,3] -> [4H,4W,3] by torch's bicubic interpolation, rounded and clamped."""
    x = torch.from_numpy(small).permute(2, 0, 1)[None].float()
    large = F.interpolate(x, scale_factor=4.0, mode="bicubic", align_corners=False)
    return large[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def compiled(ckpt: str) -> Enlarge:
    """The enlargement that users get: `tinysr_kernels.compile(ckpt)` on the CPU in float32."""
    import tinysr_kernels

    model = tinysr_kernels.compile(ckpt, device="cpu")
    return lambda small: model(small)


def measure(name: str, original: ImageArray, base: ImageArray, ours: ImageArray) -> Result:
    """Compare both enlargements [H,W,3] with the original."""

    def ssim(image: ImageArray) -> float:
        return float(structural_similarity(original, image, channel_axis=2))

    return Result(
        photograph=name,
        size=(original.shape[0], original.shape[1]),
        bicubic_psnr=float(peak_signal_noise_ratio(original, base)),
        psnr=float(peak_signal_noise_ratio(original, ours)),
        bicubic_ssim=ssim(base),
        ssim=ssim(ours),
    )


# ------------------------------------------------------------------------------------------------------- reports
def table(results: list[Result]) -> str:
    """The results as a Markdown table with a last row of means."""
    lines = [
        "| photograph | size | PSNR bicubic | PSNR ours | gain | SSIM bicubic | SSIM ours |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.photograph} | {r.size[1]}x{r.size[0]} | {r.bicubic_psnr:.2f} | {r.psnr:.2f} "
        f"| {r.psnr - r.bicubic_psnr:+.2f} | {r.bicubic_ssim:.4f} | {r.ssim:.4f} |"
        for r in results
    ]
    m = means(results)
    lines.append(
        f"| **mean** | | **{m['bicubic_psnr']:.2f}** | **{m['psnr']:.2f}** | **{m['gain']:+.2f}** "
        f"| **{m['bicubic_ssim']:.4f}** | **{m['ssim']:.4f}** |"
    )
    return "\n".join(lines) + "\n"


def means(results: list[Result]) -> dict[str, float]:
    """Mean figures over the photographs; gains are PSNR above bicubic: their mean, their median and the smallest."""
    keys = ("bicubic_psnr", "psnr", "bicubic_ssim", "ssim")
    mean = {key: float(np.mean([getattr(r, key) for r in results])) for key in keys}
    gains = [r.psnr - r.bicubic_psnr for r in results]
    return mean | {
        "gain": float(np.mean(gains)),
        "median_gain": float(np.median(gains)),
        "least_gain": float(np.min(gains)),
    }


def describe(how: degrade.Degradation) -> str:
    """The degradation in words."""
    return (
        f"Gaussian blur of {how.sigma_x:g} pixels, {how.resize} reduction by {degrade.SCALE} with antialiasing, "
        f"Gaussian noise of {how.gaussian_noise * 255:g}/255, JPEG quality {how.jpeg}"
    )


def strengths_table(strengths: Strengths) -> str:
    """Means for each strength of degradation as a Markdown table."""
    lines = [
        "| degradation | PSNR bicubic | PSNR ours | mean gain | median gain | least gain | SSIM bicubic | SSIM ours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for how, m in strengths.values():
        lines.append(
            f"| {describe(how)} | {m['bicubic_psnr']:.2f} | {m['psnr']:.2f} | {m['gain']:+.2f} "
            f"| {m['median_gain']:+.2f} | {m['least_gain']:+.2f} | {m['bicubic_ssim']:.4f} | {m['ssim']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def caveat(results: list[Result]) -> str:
    """How much of the mean gain is due to one photograph."""
    gains = {r.photograph: r.psnr - r.bicubic_psnr for r in results}
    best = max(gains, key=lambda name: gains[name])
    rest = [gain for name, gain in gains.items() if name != best]
    if not rest:
        return ""
    return f"{best} alone gains {gains[best]:+.2f} dB; without it the mean gain is {np.mean(rest):+.2f} dB.\n\n"


def report(results: list[Result], strengths: Strengths, drawn: dict[str, float], ckpt: str) -> str:
    """RESULTS.md."""
    each = ", ".join(f"{name} {gain:+.2f}" for name, gain in drawn.items())
    return (
        "# The demonstration checkpoint on photographs\n\n"
        "The network was trained on procedural images only (`python -m model.demo.train`), not on these\n"
        "photographs, which come inside scikit-image's wheel (their middle, at most 512 pixels a side).\n"
        f"Each was degraded with a fixed seed: {describe(degrade.EVALUATION)}. These are the midpoints of\n"
        "the ranges in Real-ESRGAN's published options for its first stage (arXiv 2107.10833).\n"
        "PSNR (dB) and SSIM are over RGB, against the original.\n\n"
        f"{table(results)}\n"
        f"{caveat(results)}"
        "![low resolution, bicubic, ours, original](comparison.png)\n\n"
        "Gain by strength of degradation, over the same photographs:\n\n"
        f"{strengths_table(strengths)}\n"
        "With degradations drawn at random as in training instead (three for each photograph, seeds fixed) the mean\n"
        f"gain is {np.mean(list(drawn.values())):+.2f} dB: {each}.\n\n"
        f"Made by `python -m model.demo.evaluate --ckpt {ckpt}`.\n"
    )


def comparison(rows: list[list[ImageArray]], titles: tuple[str, ...], zoom: int = 2) -> Image.Image:
    """Squares side by side, one row per photograph, enlarged by whole pixels so that nothing is smoothed."""
    bar = 28
    side = rows[0][0].shape[0] * zoom
    sheet = Image.new("RGB", (side * len(titles) + 4 * (len(titles) - 1), bar + len(rows) * (side + 4) - 4), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = column * (side + 4)
        draw.text((x + side // 2, bar // 2), title, fill="black", anchor="mm", font=ImageFont.load_default(size=18))
        for row, images in enumerate(rows):
            tile = Image.fromarray(images[column]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, bar + row * (side + 4)))
    return sheet


def evaluate(
    enlarge: Enlarge, names: tuple[str, ...] = photos.NAMES, how: degrade.Degradation = degrade.EVALUATION
) -> tuple[list[Result], list[list[ImageArray]]]:
    """Degrade, enlarge and measure every photograph; the results, and per detail its four squares."""
    results, details = [], {}
    for name in names:
        original, small = degraded(name, how)
        base, ours = bicubic(small), enlarge(small)
        results.append(measure(name, original, base, ours))
        nearest = small.repeat(degrade.SCALE, axis=0).repeat(degrade.SCALE, axis=1)
        details[name] = (nearest, base, ours, original)
    rows = [
        [image[y : y + DETAIL, x : x + DETAIL] for image in details[name]] for name, y, x in DETAILS if name in details
    ]
    return results, rows


def drawn_gains(enlarge: Enlarge, draws: int = 3, names: tuple[str, ...] = photos.NAMES) -> dict[str, float]:
    """Photograph -> mean PSNR above bicubic over `draws` degradations drawn as in training, seeds fixed."""
    gains = {}
    for name in names:
        original = photos.photograph(name)
        found = []
        for draw in range(draws):
            rng = np.random.default_rng([30, draw, photos.NAMES.index(name)])
            how = degrade.random(rng)
            degraded_image = degrade.degrade(original.astype(np.float32) / np.float32(255), how, rng)
            small = np.round(degraded_image * 255).astype(np.uint8)
            result = measure(name, original, bicubic(small), enlarge(small))
            found.append(result.psnr - result.bicubic_psnr)
        gains[name] = float(np.mean(found))
    return gains


def write(
    out: Path,
    results: list[Result],
    rows: list[list[ImageArray]],
    strengths: Strengths,
    drawn: dict[str, float],
    ckpt: str,
) -> None:
    """results.json, RESULTS.md and comparison.png in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "checkpoint": ckpt,
        "degradation": asdict(degrade.EVALUATION),
        "mean": means(results),
        "photographs": [asdict(r) for r in results],
        "drawn_gains": drawn,
        "strengths": {name: {"degradation": asdict(how), "mean": mean} for name, (how, mean) in strengths.items()},
    }
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (out / "RESULTS.md").write_text(report(results, strengths, drawn, ckpt), encoding="utf-8")
    sheet = comparison(rows, ("low resolution", "bicubic", "ours", "original"))
    sheet.save(out / "comparison.png", optimize=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ckpt", default="demo")
    parser.add_argument("--out", type=Path, default=Path("docs/demo"))
    args = parser.parse_args()
    enlarge = compiled(args.ckpt)
    results, rows = evaluate(enlarge)
    strengths: Strengths = {"light": (degrade.LIGHT, means(evaluate(enlarge, how=degrade.LIGHT)[0]))}
    strengths["middle"] = (degrade.EVALUATION, means(results))
    strengths["heavy"] = (degrade.HEAVY, means(evaluate(enlarge, how=degrade.HEAVY)[0]))
    write(args.out, results, rows, strengths, drawn_gains(enlarge), args.ckpt)
    print(table(results))
    print(strengths_table(strengths))
    print(args.out / "comparison.png")


if __name__ == "__main__":
    main()
