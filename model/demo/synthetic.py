"""Procedural training images, so that training super-resolution needs no photographs.

The images follow the dead-leaves model (Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001):
opaque shapes of power-law size painted over each other, which gives the edges, the scale invariance and the 1/f
spectrum of photographs (training on them: Achddou et al., "Synthetic images as a regularity prior for image
restoration", 2021). Leaves are filled with gradients, gratings, stripes, 1/f noise and fur-like oriented noise. Alone
they teach a network to see cartoons everywhere, so other images are made of regions with irregular, often gradual
borders or of nothing but colored noise. Strokes and text add thin lines; grain, light, shade and blur go over all.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Array = NDArray[np.float32]
Rng = np.random.Generator

# Photographs vary mostly in luminance, then along blue-yellow, least along red-green (Ruderman, Cronin, Chiao,
# "Statistics of cone responses to natural images", 1998); rows are these three directions in RGB.
OPPONENT = np.array([[1.0, 1.0, 1.0], [0.9, 0.25, -1.1], [0.8, -0.75, 0.1]], np.float32)
OPPONENT_SPREAD = np.array([0.24, 0.085, 0.06], np.float32)


def image(rng: Rng, size: int = 384) -> NDArray[np.uint8]:
    """One image [size,size,3], uint8 RGB; the same image for the same state of `rng`."""
    colors = palette(rng)
    kind = rng.random()
    if kind < 0.35:
        canvas = fill(rng, size, size, colors)
        # Large shapes first, so that the whole image is a patchwork and not details on one ground.
        leaves(rng, canvas, colors, smallest=float(rng.uniform(25.0, 60.0)), number=int(rng.integers(10, 50)))
        if rng.random() < 0.75:
            leaves(rng, canvas, colors, smallest=float(rng.uniform(6.0, 14.0)), number=int(rng.integers(5, 120)))
        if rng.random() < 0.6:
            leaves(rng, canvas, colors, smallest=float(rng.uniform(1.2, 4.0)), number=int(rng.integers(5, 300)))
    elif kind < 0.8:
        canvas = fill(rng, size, size, colors)
        regions(rng, canvas, colors, number=int(rng.integers(3, 10)))
        if rng.random() < 0.5:
            leaves(rng, canvas, colors, smallest=float(rng.uniform(2.0, 20.0)), number=int(rng.integers(3, 60)))
    else:
        canvas = colored_noise(rng, size, size, colors)
        if rng.random() < 0.5:
            regions(rng, canvas, colors, number=int(rng.integers(1, 4)))
    if rng.random() < 0.3:
        canvas = strokes(rng, canvas, colors)
    return finish(rng, canvas)


def finish(rng: Rng, canvas: Array) -> NDArray[np.uint8]:
    """Fine grain in places, smooth light and shade, the softness of a lens; [H,W,3] -> the same in uint8."""
    height, width = canvas.shape[:2]
    grain = min(float(rng.exponential(0.06)), 0.25) * power_noise(rng, height, width, float(rng.uniform(0.8, 2.4)))
    where = 1 / (1 + np.exp(-3 * power_noise(rng, height, width, 3.5)))
    light = float(rng.uniform(0.0, 0.4)) * power_noise(rng, height, width, 5.0)
    canvas = np.clip(canvas * np.exp(light + where * grain)[:, :, None], 0.0, 1.0) ** float(rng.uniform(0.8, 1.3))
    image = Image.fromarray(np.round(canvas * 255.0).astype(np.uint8))
    # Few photographs are sharp to the pixel.
    if rng.random() < 0.65:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.8))))
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------------- colors
def palette(rng: Rng, number: int = 12) -> Array:
    """Colors [number,3] in [0,1] that go together: one mean, photograph-like spread, some nearly gray sets."""
    spread = OPPONENT_SPREAD * np.float32(rng.uniform(0.5, 1.5))
    spread[1:] *= np.float32(rng.choice([0.15, 0.5, 0.9, 1.3]))
    mean = rng.uniform(0.25, 0.65) + (rng.normal(0, 0.6, 3) * spread * [0.0, 1.0, 1.0]) @ OPPONENT
    # A Laplacian, not a Gaussian: most colors lie near the mean, a few are saturated.
    offsets = rng.laplace(0.0, 0.75, (number, 3)) * spread
    return np.clip(mean + offsets @ OPPONENT, 0.02, 0.98).astype(np.float32)


def color(rng: Rng, colors: Array) -> Array:
    """One color [3] near one of the palette."""
    return np.clip(colors[rng.integers(len(colors))] + rng.normal(0, 0.03, 3), 0, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ textures
def power_noise(rng: Rng, height: int, width: int, exponent: float, stretch: float = 1.0, angle: float = 0.0) -> Array:
    """Gaussian noise [height,width] with amplitude spectrum f^(-exponent/2), mean 0, std 1.

    `stretch` above 1 elongates the structures along `angle`, as in fur, grass, water or wood.
    """
    fy = np.fft.fftfreq(height)[:, None]
    fx = np.fft.rfftfreq(width)[None, :]
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    radius = np.sqrt((along * stretch) ** 2 + across**2)
    amplitude = np.maximum(radius, 1.0 / max(height, width)) ** (-exponent / 2)
    amplitude[0, 0] = 0.0
    spectrum = amplitude * (rng.normal(size=radius.shape) + 1j * rng.normal(size=radius.shape))
    noise = np.fft.irfft2(spectrum, s=(height, width))
    return (noise / max(float(noise.std()), 1e-12)).astype(np.float32)


def grating(rng: Rng, height: int, width: int) -> Array:
    """Parallel waves in [-1,1], sinusoidal to rectangular, slightly bent, 3 to 40 pixels long."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(3.0), np.log(40.0)))
    bend = rng.uniform(0, 0.4) * power_noise(rng, height, width, 3.0) * min(height, width) / 16
    phase = (x * np.cos(angle) + y * np.sin(angle) + bend) * (2 * np.pi / period) + rng.uniform(0, 6.3)
    steepness = rng.choice([0.1, 1.0, 3.0])
    return (np.tanh(steepness * np.sin(phase)) / np.tanh(steepness)).astype(np.float32)


def fur(rng: Rng, height: int, width: int) -> Array:
    """Oriented noise, mean 0, std about 1, whose direction turns slowly across the image."""
    turn = power_noise(rng, height, width, 3.0)
    base, stretch, exponent = rng.uniform(0, np.pi), rng.uniform(3, 12), rng.uniform(1.2, 2.6)
    first, second = (
        power_noise(rng, height, width, exponent, stretch, base + offset) for offset in (0.0, rng.uniform(0.2, 1.0))
    )
    weight = 1 / (1 + np.exp(-3 * turn))
    return (weight * first + (1 - weight) * second).astype(np.float32)


def colored_noise(rng: Rng, height: int, width: int, colors: Array) -> Array:
    """A random field [height,width,3] with the spectrum of photographs, its chroma smoother than its luminance."""
    exponent = float(rng.uniform(1.6, 2.8))
    luminance = power_noise(rng, height, width, exponent)
    if rng.random() < 0.3:
        luminance = 0.6 * luminance + 0.8 * fur(rng, height, width)
    chroma = [power_noise(rng, height, width, exponent + 0.6) for _ in range(2)]
    spread = OPPONENT_SPREAD * np.array([rng.uniform(0.25, 1.0), *rng.uniform(0.1, 0.7, 2)], np.float32)
    field = np.stack([luminance, *chroma], axis=-1) * spread
    return (colors.mean(axis=0) + field @ OPPONENT).astype(np.float32)


def fill(rng: Rng, height: int, width: int, colors: Array) -> Array:
    """A textured patch [height,width,3]: a gradient between two colors, modulated by one of the textures."""
    first, second = color(rng, colors), color(rng, colors)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (x - width / 2) * np.cos(angle) / width + (y - height / 2) * np.sin(angle) / height + 0.5
    patch = first + np.float32(rng.uniform(0, 1.0)) * np.clip(ramp, 0, 1)[:, :, None] * (second - first)
    makers: list[Callable[[], Array] | None] = [
        None,
        lambda: grating(rng, height, width),
        lambda: power_noise(rng, height, width, rng.uniform(0.8, 3.0)),
        lambda: power_noise(rng, height, width, rng.uniform(1.8, 3.6)),
        lambda: fur(rng, height, width),
    ]
    maker = makers[rng.choice(len(makers), p=[0.28, 0.07, 0.17, 0.26, 0.22])]
    if maker is None or min(height, width) < 8:
        return patch.astype(np.float32)
    # The texture moves towards the second color or only in brightness, rarely at full contrast.
    direction = (second - first) if rng.random() < 0.4 else np.full(3, rng.uniform(0.3, 1.0), np.float32)
    strength = np.float32(min(rng.exponential(0.10), 0.4))
    return (patch + strength * maker()[:, :, None] * direction).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- shapes
def leaves(rng: Rng, canvas: Array, colors: Array, smallest: float, number: int) -> None:
    """Paint `number` opaque shapes of power-law size (density r^-3, r >= smallest) over `canvas` [H,W,3], in place."""
    height, width = canvas.shape[:2]
    largest = 0.45 * min(height, width)
    # Inverse of the cumulative distribution of r^-3 between the two radii.
    u = rng.random(number)
    radii = (smallest**-2.0 - u * (smallest**-2.0 - largest**-2.0)) ** -0.5
    # Large shapes would hide what was painted before: a third of the images go from large to small.
    if rng.random() < 0.34:
        radii = np.sort(radii)[::-1]
    defocus = rng.choice([0.0, 1.0, 3.0])
    for radius in radii:
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        softness = 1.0 + defocus * rng.exponential(1.0)
        reach = int(np.ceil(radius + softness / 2)) + 1
        y0, y1 = max(0, int(cy) - reach), min(height, int(cy) + reach + 1)
        x0, x1 = max(0, int(cx) - reach), min(width, int(cx) + reach + 1)
        if y1 - y0 < 1 or x1 - x0 < 1:
            continue
        y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
        distance = shape_distance(rng, x - np.float32(cx), y - np.float32(cy), float(radius))
        cover = np.clip(0.5 - distance / softness, 0.0, 1.0)[:, :, None]
        region = canvas[y0:y1, x0:x1]
        patch = fill(rng, y1 - y0, x1 - x0, colors)
        if rng.random() < 0.4:
            # Round objects are lighter in the middle or towards one side; the fill's gradient does the latter.
            patch *= 1 + np.float32(rng.uniform(-0.3, 0.5)) * np.clip(distance / np.float32(radius), -1, 0)[:, :, None]
        region += cover * (patch - region)


def regions(rng: Rng, canvas: Array, colors: Array, number: int) -> None:
    """Cover parts of `canvas` [H,W,3] with fills bounded by level lines of noise, sharp or gradual; in place."""
    height, width = canvas.shape[:2]
    for _ in range(number):
        field = power_noise(rng, height, width, float(rng.uniform(3.0, 5.0)))
        slope = np.mean(np.hypot(*np.gradient(field)))
        softness = np.exp(rng.uniform(np.log(0.7), np.log(25.0)))  # in pixels, where the field is as steep as usual
        distance = (field - rng.uniform(-0.8, 1.2)) / slope / softness
        cover = np.clip(0.5 + distance, 0, 1)[:, :, None].astype(np.float32)
        layer = fill if rng.random() < 0.7 else colored_noise
        canvas += cover * (layer(rng, height, width, colors) - canvas)


def shape_distance(rng: Rng, x: Array, y: Array, radius: float) -> NDArray[np.floating[Any]]:
    """Signed distance (negative inside, in pixels, near the edge) to a random shape of about `radius` at the origin."""
    angle, flat = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1.0)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        return np.hypot(x, y) - radius
    if kind == 1:
        # First-order distance: the ellipse's function over the length of its gradient.
        q = np.hypot(u, v / flat)
        gradient = np.hypot(u, v / flat**2) / np.maximum(q, 1e-6)
        return (q - radius) / np.maximum(gradient, 1e-6)
    if kind == 2:
        return np.maximum(np.abs(u) - 0.7 * radius, np.abs(v) - 0.7 * radius * flat)
    # A convex polygon: the largest distance to its half planes.
    normals = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
    normals = np.concatenate([normals, [normals[0] + 2.1, normals[0] + 4.2]])
    sides = [np.cos(a) * x + np.sin(a) * y - radius * rng.uniform(0.4, 0.7) for a in normals]
    return np.asarray(np.maximum.reduce(sides), np.float32)


def strokes(rng: Rng, canvas: Array, colors: Array) -> Array:
    """Thin lines, curves and words over `canvas` [H,W,3], drawn at three times the size for smooth edges."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(2, 7)):
        mask = Image.new("L", (3 * width, 3 * height), 0)
        draw = ImageDraw.Draw(mask)
        for _ in range(rng.integers(1, 5)):
            if rng.random() < 0.5:
                _draw_curve(rng, draw, 3 * width, 3 * height)
            else:
                _draw_words(rng, draw, 3 * width, 3 * height)
        small = mask.resize((width, height), Image.Resampling.BOX)
        cover = np.asarray(small, np.float32)[:, :, None] / np.float32(255)
        canvas = canvas + cover * (color(rng, colors) - canvas)
    return canvas


def _draw_curve(rng: Rng, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """A straight or bent line of 0.7 to 5 (final) pixels."""
    steps = np.linspace(0, 1, 24)[:, None]
    a, b, c = (rng.uniform(-0.1, 1.1, 2) * [width, height] for _ in range(3))
    b = b if rng.random() < 0.5 else (a + c) / 2
    points = (1 - steps) ** 2 * a + 2 * steps * (1 - steps) * b + steps**2 * c
    draw.line([tuple(p) for p in points.tolist()], fill=255, width=int(rng.integers(2, 16)), joint="curve")


def _draw_words(rng: Rng, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """Random characters in the font that comes with Pillow, 8 to 40 (final) pixels high."""
    letters = string.ascii_letters + string.digits + "   .,:-"
    lines = ["".join(rng.choice(list(letters), rng.integers(3, 24))) for _ in range(rng.integers(1, 5))]
    font = ImageFont.load_default(size=int(rng.integers(24, 120)))
    place = (int(rng.uniform(-0.1, 0.8) * width), int(rng.uniform(-0.05, 0.9) * height))
    draw.multiline_text(place, "\n".join(lines), fill=255, font=font)
