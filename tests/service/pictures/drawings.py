"""Draws pictures for the tests: trousers on walls, boards and cloth."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TROUSERS = [(60, 20), (140, 20), (150, 220), (112, 220), (100, 70), (88, 220), (50, 220)]


def encode(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def stencil(turn: float = 0) -> Image.Image:
    """Draw trousers, 200 x 240; no mirror image or rotation of them looks the same."""
    image = Image.new("L", (200, 240), 0)
    ImageDraw.Draw(image).polygon(TROUSERS, 255)
    ImageDraw.Draw(image).rectangle((140, 20, 160, 60), 255)  # one pocket sticks out
    return image.rotate(turn)


def worn(background: Image.Image, colour: str = "#305070") -> Image.Image:
    return Image.composite(Image.new("RGB", (200, 240), colour), background, stencil())


def plain(colour: str = "white") -> Image.Image:
    return Image.new("RGB", (200, 240), colour)


def shaded() -> Image.Image:
    """Draw an unevenly lit wall, with the garment's soft shadow and a camera's noise."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:240j, -1:1:200j]
    shadow = np.asarray(stencil().filter(ImageFilter.GaussianBlur(8)), float) / 255
    light = (225 + 15 * x - 25 * (x * x + y * y)) * (1 - 0.2 * np.roll(shadow, (5, 5), (0, 1)))
    noisy = light[..., None] + random.normal(0, 2, (240, 200, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def wooden() -> Image.Image:
    """Draw dark boards: streaks along the grain, joints across."""
    random = np.random.default_rng(1)
    streaks = Image.fromarray(random.integers(0, 256, (80, 3), np.uint8)).resize((200, 240))
    grain = np.asarray(streaks, float)[..., None] / 255
    boards = np.array([70, 45, 28]) * (0.7 + 0.6 * grain)
    boards[::48] *= 0.5
    return Image.fromarray(boards.astype(np.uint8))


def checked() -> Image.Image:
    y, x = np.mgrid[:240, :200]
    dark = ((x // 20 + y // 20) % 2)[..., None]
    return Image.fromarray(np.where(dark, [150, 60, 60], [240, 230, 200]).astype(np.uint8))


GRAY = worn(plain()).convert("L")
