"""All stages of the small run in order, each resumable: `python -m model.compress small --out build/small`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.compress import count
from model.compress.released import write_folded, write_json, write_transformer, write_vae
from model.compress.small import data
from model.compress.small.preset import Preset
from model.compress.small.report import Outcome, write_report
from model.compress.small.student import (
    Student,
    compress_vae,
    config_of,
    distilled_pairs,
    find_mask,
    restore,
)
from model.compress.small.teacher import Teacher, make_teacher
from model.demo import evaluate, photos
from model.demo.evaluate import Enlarge, ImageArray
from model.reference.pipelines import tinysr
from model.reference.sd3_transformer import SD3Config

Report = Callable[[str], None]


def small(preset: Preset, out: Path, report: Report, names: tuple[str, ...] = photos.NAMES) -> Outcome:
    """Train the teacher, compress it by every method, evaluate all on photographs; writes RESULTS.md to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    _same_preset(preset, out / "preset.json")
    pairs = data.pairs(preset, out)
    teacher, latents = make_teacher(preset, pairs, out, report)
    config = config_of(preset, latents.scaling)
    vae = compress_vae(preset, teacher, pairs, config, out, report)
    distilled = distilled_pairs(preset, teacher, vae, latents, pairs, out)
    students = {}
    for method in preset.methods:
        mask = find_mask(method, preset, teacher, latents, out / method, report)
        students[method] = restore(preset, teacher, vae, mask, config, distilled, pairs, out / method, report)
        export(students[method], teacher, out / method)
        report(f"student, {method}: written to {out / method / 'student'}")
    outcome = measure(preset, teacher, students, latents.scaling, out, names, report)
    write_report(outcome, out)
    return outcome


def _same_preset(preset: Preset, path: Path) -> None:
    """Refuse to resume in the folder of another preset; ValueError names the fields that differ."""
    own = json.loads(json.dumps(asdict(preset)))
    if path.exists():
        other = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(k for k in {*own, *other} if own.get(k) != other.get(k))
        if changed:
            raise ValueError(f"{path.parent} holds a run of another preset ({', '.join(changed)} differ)")
    write_json(path, own)


def export(student: Student, teacher: Teacher, folder: Path) -> None:
    """The student in the released layout (`student/`) and in the project's own (`student.safetensors`)."""
    config = teacher.transformer.config
    values = {name: getattr(config, name) for name in SD3Config.__dataclass_fields__}
    values = {"_class_name": "TinySD3Transformer2DModel", **values, "num_layers": sum(student.mask)}
    write_transformer(folder / "student", student.transformer.state_dict().items(), values)
    write_vae(folder / "student", student.vae.state_dict(), student.config)
    write_folded(folder / "student", folder / "student.safetensors")


# -------------------------------------------------------------------------------------------------------- evaluation
def enlarger(transformer: object, vae: object, student_config: object) -> Enlarge:
    """Enlargement by training-time networks through model.reference.pipelines.tinysr, without color fix."""

    def enlarge(small_image: ImageArray) -> ImageArray:
        x = torch.from_numpy(small_image.astype(np.float32) / 255).permute(2, 0, 1)[None]
        y: Tensor = tinysr(x, transformer, vae, student_config, "none")  # type: ignore[arg-type]
        return (y[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)

    return enlarge


def compiled(folder: Path) -> Enlarge:
    """Enlargement by what users get: `tinysr_kernels.compile` of the released layout, without color fix."""
    import tinysr_kernels

    model = tinysr_kernels.compile(folder, device="cpu", color_fix="none")
    return lambda image: model(image)


def measure(
    preset: Preset,
    teacher: Teacher,
    students: dict[str, Student],
    scaling: float,
    out: Path,
    names: tuple[str, ...],
    report: Report,
) -> Outcome:
    """PSNR and SSIM of teacher and students on photographs; parameters and multiplications of both."""
    config = config_of(preset, scaling)
    ways = {"teacher": enlarger(teacher, teacher, config)}
    ways |= {method: compiled(out / method / "student") for method in students}
    results, details = {}, {}
    for name, enlarge in ways.items():
        results[name], details[name] = evaluate.evaluate(enlarge, names)
        mean = evaluate.means(results[name])
        report(f"{name}: PSNR {mean['psnr']:.3f} dB, bicubic {mean['bicubic_psnr']:.3f} dB, SSIM {mean['ssim']:.4f}")
    latent = torch.empty(1, preset.latent, preset.window, preset.window)
    sizes = {"teacher": count.teacher_table(teacher.transformer.config, teacher.vae, latent, preset.prompt_tokens)}
    for method, student in students.items():
        sizes[method] = count.student_table(student.transformer, student.vae, latent)
    masks = {method: "".join("01"[kept] for kept in student.mask) for method, student in students.items()}
    return Outcome(results, details, sizes, masks, _seconds(out))


def _seconds(out: Path) -> dict[str, float]:
    """Processor time of every stage, from the logs."""
    found = {}
    for path in sorted(out.rglob("*.jsonl")):
        if path.stem.endswith(".history"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        found[str(path.relative_to(out).with_suffix(""))] = float(json.loads(lines[-1])["seconds"])
    return found
