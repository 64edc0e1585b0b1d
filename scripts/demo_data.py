"""The pictures that the demo checkpoint learns from, and the exact edits that it learns.

This module has only two parts: the sources of training pictures (a few photographs that installed
packages contain under a free licence, and generated pictures), and `EDITS`, the classical form of
every edit. Language is in `demo_prompts.py`, training in `train_demo.py`.

A picture is a float32 array (H, W, 3) in 0..1, sRGB as displayed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Picture = NDArray[np.floating[Any]]
Edit = Callable[[Picture], Picture]

# ------------------------------------------------------------------------------------------------
# Photographs
# ------------------------------------------------------------------------------------------------

# Package and file; the licences are in the card, src/step1x_edit/model/demo/README.md.
TRAINING_PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
TRAINING_TEXTURES = {
    "camera": ("skimage", "data/camera.png"),
    "brick": ("skimage", "data/brick.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "coins": ("skimage", "data/coins.png"),
}
HELD_OUT_PHOTOS = {
    "coffee": ("skimage", "data/coffee.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}


def load_photo(package: str, name: str) -> Picture:
    """Reads a picture that an installed package contains."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{package} is not installed; run: pip install 'step1x-edit[train]'"
        )
    with Image.open(Path(spec.origin).parent / name) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


def resize(picture: Picture, width: int, height: int) -> Picture:
    """Resamples with Lanczos, as the pipeline does."""
    image = Image.fromarray((picture * 255 + 0.5).clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32) / 255


# ------------------------------------------------------------------------------------------------
# Generated pictures
# ------------------------------------------------------------------------------------------------


def fractal_noise(rng: np.random.Generator, size: int, slope: float) -> Picture:
    """Gaussian noise with an amplitude spectrum of 1/f^slope in three correlated channels."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) / f**slope
    spectrum[:, 0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(size, size)).transpose(1, 2, 0)
    noise /= noise.std() + 1e-6
    mix = np.eye(3) * rng.uniform(0.1, 0.8) + rng.uniform(0.2, 1.0)
    strength = rng.uniform(0.05, 0.22)
    out = rng.uniform(0.3, 0.7, 3) + strength * (noise @ mix) / np.linalg.norm(mix, axis=0)
    return out.clip(0, 1).astype(np.float32)


def gradient(rng: np.random.Generator, size: int) -> Picture:
    """A linear ramp between two colours."""
    y, x = np.mgrid[0:size, 0:size] / size
    a = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(a) * x + np.sin(a) * y)[..., None]
    ramp = (ramp - ramp.min()) / (np.ptp(ramp) + 1e-6)
    low, high = rng.uniform(0, 1, (2, 3))
    return (low * (1 - ramp) + high * ramp).astype(np.float32)


def dead_leaves(rng: np.random.Generator, size: int, photos: list[Picture]) -> Picture:
    """Opaque shapes of power-law size that cover each other: edges as in photographs."""
    canvas = fractal_noise(rng, size, rng.uniform(1.0, 2.0))
    r_min, r_max = rng.uniform(2, 8), rng.uniform(0.2, 0.6) * size
    for _ in range(int(rng.integers(40, 220))):
        u = rng.uniform()
        radius = (r_max**-1.5 + u * (r_min**-1.5 - r_max**-1.5)) ** (-1 / 1.5)
        mask_image = Image.new("L", (size, size))
        draw = ImageDraw.Draw(mask_image)
        cx, cy = rng.uniform(0, size, 2)
        kind = rng.integers(3)
        if kind == 0:
            rx, ry = radius, radius * rng.uniform(0.3, 1.0)
            draw.ellipse([cx - rx, cy - ry, cx + rx, cy + ry], fill=255)
        else:
            corners = int(rng.integers(3, 8))
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
            reach = radius * rng.uniform(0.5, 1.3, corners)
            draw.polygon(
                [
                    (cx + r * np.cos(a), cy + r * np.sin(a))
                    for a, r in zip(angles, reach, strict=True)
                ],
                fill=255,
            )
        soft = rng.uniform(0.4, 1.2) if rng.uniform() < 0.7 else rng.uniform(1.2, 6)
        x0, x1 = int(max(0, cx - 1.4 * radius - 8)), int(min(size, cx + 1.4 * radius + 9))
        y0, y1 = int(max(0, cy - 1.4 * radius - 8)), int(min(size, cy + 1.4 * radius + 9))
        mask = np.asarray(mask_image, np.float32)[y0:y1, x0:x1, None] / 255
        if mask.size == 0:
            continue
        mask = ndimage.gaussian_filter(mask, (soft, soft, 0))
        fill = _fill(rng, max(y1 - y0, x1 - x0), photos)[: y1 - y0, : x1 - x0]
        canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - mask) + fill * mask
    return canvas


def _fill(rng: np.random.Generator, size: int, photos: list[Picture]) -> Picture:
    kind = rng.uniform()
    if kind < 0.35:
        return np.broadcast_to(rng.uniform(0, 1, 3).astype(np.float32), (size, size, 3))
    if kind < 0.55:
        return gradient(rng, size)
    if kind < 0.8 or not photos:
        colour = rng.uniform(0, 1, 3)
        texture = fractal_noise(rng, max(size, 4), rng.uniform(0.5, 1.8))[:size, :size]
        return (colour + (texture - 0.5) * rng.uniform(0.1, 1.0)).clip(0, 1).astype(np.float32)
    return random_crop(rng, photos[int(rng.integers(len(photos)))], size)


def landscape(rng: np.random.Generator, size: int) -> Picture:
    """A sky ramp over a few ragged ridges."""
    top, bottom = rng.uniform(0.3, 1, 3), rng.uniform(0.2, 1, 3)
    ramp = np.linspace(0, 1, size)[:, None, None]
    canvas = (
        np.broadcast_to(top * (1 - ramp) + bottom * ramp, (size, size, 3)).astype(np.float32).copy()
    )
    canvas += 0.15 * (fractal_noise(rng, size, 1.5) - 0.5)
    for level in np.linspace(0.35, 0.85, int(rng.integers(2, 5))):
        walk = ndimage.gaussian_filter1d(np.cumsum(rng.standard_normal(size)), rng.uniform(0.5, 8))
        ridge = level * size + walk / (np.abs(walk).max() + 1e-6) * size * rng.uniform(0.05, 0.2)
        below = ((np.arange(size)[:, None] - ridge[None]) / rng.uniform(1, 3) + 0.5).clip(0, 1)
        colour = rng.uniform(0, 0.8, 3)
        texture = colour + rng.uniform(0.1, 0.6) * (
            fractal_noise(rng, size, rng.uniform(0.6, 1.6)) - 0.5
        )
        canvas = canvas * (1 - below[..., None]) + texture * below[..., None]
    return canvas.clip(0, 1).astype(np.float32)


def lettering(rng: np.random.Generator, size: int) -> Picture:
    """Words and bars over a ramp or noise: sharp strokes of all sizes."""
    canvas = gradient(rng, size) if rng.uniform() < 0.6 else fractal_noise(rng, size, 1.2)
    image = Image.fromarray((canvas * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    letters = "ABCDEFGHKLMNPRSTUVXYZabcdefghkmnopqrstuvwxyz0123456789"
    for _ in range(int(rng.integers(4, 16))):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        x, y = rng.uniform(-20, size, 2)
        if rng.uniform() < 0.7:
            word = "".join(
                letters[int(i)] for i in rng.integers(len(letters), size=rng.integers(2, 9))
            )
            draw.text(
                (x, y),
                word,
                fill=colour,
                font=ImageFont.load_default(size=float(rng.uniform(9, 70))),
            )
        else:
            w, h = rng.uniform(2, size / 3, 2)
            draw.rectangle([x, y, x + w, y + h], fill=colour)
    return np.asarray(image, np.float32) / 255


def draw_picture(rng: np.random.Generator, size: int, photos: list[Picture]) -> Picture:
    """One picture of a random kind."""
    kind = rng.uniform()
    if kind < 0.62:
        return dead_leaves(rng, size, photos)
    if kind < 0.8:
        return landscape(rng, size)
    if kind < 0.92:
        return lettering(rng, size)
    return fractal_noise(rng, size, rng.uniform(0.9, 2.0))


# ------------------------------------------------------------------------------------------------
# Crops
# ------------------------------------------------------------------------------------------------


def random_crop(
    rng: np.random.Generator, picture: Picture, size: int, scales: tuple[float, float] = (0.4, 2.5)
) -> Picture:
    """A square crop at a random scale (target pixels per source pixel), flipped at random."""
    height, width = picture.shape[:2]
    low = max(scales[0], size / min(height, width))
    scale = float(np.exp(rng.uniform(np.log(low), np.log(max(low, scales[1])))))
    side = min(max(round(size / scale), 2), height, width)
    y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = picture[y : y + side, x : x + side]
    if rng.uniform() < 0.5:
        crop = crop[:, ::-1]
    if rng.uniform() < 0.15:
        crop = crop[::-1]
    return crop if side == size else resize(np.ascontiguousarray(crop), size, size)


def recolour(rng: np.random.Generator, picture: Picture) -> Picture:
    """Changes channel order, saturation, gain and gamma: few photographs show many palettes."""
    if rng.uniform() < 0.35:
        picture = picture[..., rng.permutation(3)]
    saturation = rng.uniform(0.3, 1.6) if rng.uniform() < 0.6 else 1.0
    luma = _luma(picture)
    picture = luma + (picture - luma) * saturation
    gain = rng.uniform(0.7, 1.25) * (1 + 0.12 * rng.standard_normal(3))
    return ((picture * gain).clip(0, 1) ** rng.uniform(0.7, 1.4)).astype(np.float32)


# ------------------------------------------------------------------------------------------------
# Edits
# ------------------------------------------------------------------------------------------------


def _luma(p: Picture) -> Picture:
    return (p @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def _clip(p: NDArray[np.floating]) -> Picture:
    return np.clip(p, 0, 1).astype(np.float32)


def _ramp(value: Picture, stops: list[tuple[float, float, float]]) -> Picture:
    """Colours a grey picture by linear interpolation through equally spaced stops."""
    at = np.linspace(0, 1, len(stops))
    colours = np.array(stops)
    return _clip(np.stack([np.interp(value[..., 0], at, colours[:, c]) for c in range(3)], -1))


def _tint(colour: tuple[float, float, float], keep: float = 0.15) -> Edit:
    """A monochrome print in one colour: dark parts take its shade, light parts stay light."""
    target = np.array(colour, np.float32)

    def edit(p: Picture) -> Picture:
        y = _luma(p)
        toned = y * (target + (1 - target) * y * 0.5)
        return _clip(keep * p + (1 - keep) * toned)

    return edit


def black_and_white(p: Picture) -> Picture:
    return np.repeat(_luma(p), 3, -1)


def sepia(p: Picture) -> Picture:
    return _clip(
        _luma(p) * np.array([1.07, 0.87, 0.62], np.float32)
        + np.array([0.06, 0.03, 0.0], np.float32)
    )


def invert(p: Picture) -> Picture:
    return 1 - p


def brighten(p: Picture) -> Picture:
    return _clip(0.14 + 0.86 * p**0.7)


def darken(p: Picture) -> Picture:
    return _clip(0.48 * p)


def night(p: Picture) -> Picture:
    y = _luma(p)
    return _clip(
        (0.4 * p + 0.6 * y) * np.array([0.22, 0.32, 0.58], np.float32)
        + np.array([0.0, 0.01, 0.05], np.float32)
    )


def sunset(p: Picture) -> Picture:
    return _clip(
        p * np.array([1.02, 0.80, 0.50], np.float32) + np.array([0.14, 0.05, 0.0], np.float32)
    )


def winter(p: Picture) -> Picture:
    y = _luma(p)
    return _clip(
        (0.7 * p + 0.3 * y) * np.array([0.72, 0.88, 0.98], np.float32)
        + np.array([0.04, 0.08, 0.16], np.float32)
    )


def contrast(p: Picture) -> Picture:
    return _clip(p + 0.62 * (p - 0.5) * (1 - np.abs(2 * p - 1) ** 2))


def vivid(p: Picture) -> Picture:
    y = _luma(p)
    return _clip(y + (p - y) * 1.75)


def fade(p: Picture) -> Picture:
    y = _luma(p)
    return _clip(0.34 + 0.46 * (y + (p - y) * 0.55))


def fog(p: Picture) -> Picture:
    return _clip(0.38 * p + 0.62 * np.array([0.84, 0.86, 0.88], np.float32))


def swap_red_blue(p: Picture) -> Picture:
    return np.ascontiguousarray(p[..., ::-1])


def autumn(p: Picture) -> Picture:
    """Leaves turn: what is green moves to orange, and everything becomes a little golden."""
    m = np.array([[0.62, 0.62, 0.0], [0.18, 0.56, 0.05], [0.05, 0.12, 0.42]], np.float32)
    return _clip(p @ m.T)


def blur(p: Picture) -> Picture:
    return _clip(ndimage.gaussian_filter(p, (5, 5, 0), mode="nearest"))


def pencil_sketch(p: Picture) -> Picture:
    """Colour dodge with the blurred negative: paper white, strokes where the tone falls."""
    y = ndimage.gaussian_filter(_luma(p), (1, 1, 0), mode="nearest")
    soft = ndimage.gaussian_filter(y, (9, 9, 0), mode="nearest")
    stroke = ((y + 0.12) / (soft + 0.12)).clip(0, 1)
    shade = 0.80 * stroke**1.8 + 0.20 * y
    return np.repeat(_clip(0.06 + 0.94 * shade), 3, -1)


def thermal(p: Picture) -> Picture:
    return _ramp(
        _luma(p),
        [
            (0.02, 0.0, 0.20),
            (0.35, 0.0, 0.55),
            (0.80, 0.15, 0.35),
            (1.0, 0.60, 0.05),
            (1.0, 1.0, 0.75),
        ],
    )


def cyberpunk(p: Picture) -> Picture:
    return _ramp(
        _luma(p),
        [
            (0.05, 0.0, 0.20),
            (0.45, 0.0, 0.60),
            (0.95, 0.10, 0.70),
            (0.35, 0.75, 0.95),
            (0.75, 1.0, 1.0),
        ],
    )


def stencil(p: Picture) -> Picture:
    """Two inks with a soft edge at the picture's own middle tone."""
    y = ndimage.gaussian_filter(_luma(p), (3, 3, 0), mode="nearest")
    ink = 1 / (1 + np.exp(-(y - 0.45) * 14))
    return _clip(
        np.array([0.10, 0.10, 0.16], np.float32) * (1 - ink)
        + np.array([0.96, 0.93, 0.84], np.float32) * ink
    )


def mosaic(p: Picture) -> Picture:
    """Squares of 16 px, the cell of the demo autoencoder, counted from the top left corner."""
    height, width = p.shape[:2]
    padded = np.pad(p, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge")
    cells = padded.reshape(padded.shape[0] // 16, 16, padded.shape[1] // 16, 16, 3).mean((1, 3))
    return np.repeat(np.repeat(cells, 16, 0), 16, 1)[:height, :width].astype(np.float32)


def painting(p: Picture) -> Picture:
    """Broad flat strokes (a median over 13 px on a half-size copy) in rich colours."""
    height, width = p.shape[:2]
    half = resize(p, max(1, width // 2), max(1, height // 2))
    flat = np.stack(
        [ndimage.median_filter(half[..., c], size=7, mode="nearest") for c in range(3)], -1
    )
    flat = resize(flat, width, height)
    y = _luma(flat)
    rich = y + (flat - y) * 1.6
    return _clip(rich)


EDITS: dict[str, Edit] = {
    "bw": black_and_white,
    "sepia": sepia,
    "invert": invert,
    "bright": brighten,
    "dark": darken,
    "night": night,
    "warm": sunset,
    "cool": winter,
    "contrast": contrast,
    "vivid": vivid,
    "faded": fade,
    "fog": fog,
    "red": _tint((0.95, 0.08, 0.06)),
    "green": _tint((0.05, 0.72, 0.12)),
    "blue": _tint((0.05, 0.22, 0.95)),
    "pink": _tint((1.0, 0.52, 0.72), keep=0.3),
    "purple": _tint((0.55, 0.12, 0.80)),
    "swap": swap_red_blue,
    "autumn": autumn,
    "blur": blur,
    "sketch": pencil_sketch,
    "thermal": thermal,
    "cyberpunk": cyberpunk,
    "stencil": stencil,
    "mosaic": mosaic,
    "painting": painting,
}
"""Every edit in its exact form; spatial sizes are in pixels of the picture that the model gets."""

CORE_EDITS = tuple(EDITS)[: tuple(EDITS).index("sketch")]
"""The edits that the checkpoint must do well; the others are harder for it."""
