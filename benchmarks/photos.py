"""Measures the accuracy that converting photographs costs, on pictures made from the test images.

First the test images are enlarged 10 to 25 times, in blocks or smoothly in turn, and laid with
uneven margins on white or on black. Then the garments are tinted and laid into scenes: walls under
uneven light, boards, cloth, with a soft shadow and a camera's noise. The service's conversion must
find the garments again. Run by hand: `python -m benchmarks.photos [COUNT]`.

Real photographs are measured with `python -m benchmarks.photos --folder DIR` (photo_folder.py).
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from benchmarks import photo_folder
from service.model.classifier import Classifier, load_classifiers
from service.pictures.conversion import read_picture
from service.pictures.decoding import configure_pillow
from service.settings import Settings
from training.dataset import DatasetError, load

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Random = np.random.Generator
GROUNDS = ("white", "black")
FORMATS = ("PNG", "JPEG")
SCENE_SIDE = 420  # the side of a garment in a scene, in pixels
SCENE_IMAGES = 1000
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Row:
    """One layout of the test images, and its figures.

    Attributes:
        ground: the background: "white" with the image negated, "black" with the image as it is, or
            one of SCENES.
        format: the file format.
        accuracy: the share of right answers after the conversion.
        loss: points of accuracy lost compared with the test images themselves.
        milliseconds: the median time of a conversion.
    """

    ground: str
    format: str
    accuracy: float
    loss: float
    milliseconds: float


def enlarged(pixels: Pixels, ground: str, smoothly: bool, random: Random) -> Image.Image:
    """Return a test image as a large picture.

    Args:
        pixels: uint8 [28, 28].
        ground: one of GROUNDS.
        smoothly: enlarge by bicubic interpolation instead of in blocks.
        random: draws the scale, 10 to 25, and four margins of up to half the garment's side.
    """
    side = 28 * int(random.integers(10, 26))
    left, top, right, bottom = (int(margin) for margin in random.integers(0, side // 2, 4))
    white = ground == "white"
    garment = Image.fromarray(255 - pixels if white else pixels)
    picture = Image.new("L", (left + side + right, top + side + bottom), 255 if white else 0)
    resampling = Image.Resampling.BICUBIC if smoothly else Image.Resampling.NEAREST
    picture.paste(garment.resize((side, side), resampling), (left, top))
    return picture


def wall(height: int, width: int, random: Random, low: float, high: float) -> Floats:
    """Return a wall [height, width, 3] of any colour in a range, under uneven light."""
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    across, down = random.uniform(-0.08, 0.08, 2)
    light = 1 + across * x + down * y - random.uniform(0, 0.12) * (x * x + y * y)
    return np.asarray(random.uniform(low, high, 3) * light[..., None])


def boards(height: int, width: int, random: Random, low: float, high: float) -> Floats:
    """Return boards with a grain and dark joints, vertical or horizontal."""
    length, across = (height, width) if random.random() < 0.5 else (width, height)
    grain = Image.fromarray(random.integers(0, 256, (across // 6, 4), np.uint8))
    lying = np.asarray(grain.resize((length, across), Image.Resampling.BICUBIC), float) / 255
    wood = random.uniform(low, high) * np.array([1.0, 0.85, 0.7]) ** (1 - low / 255)
    picture = wood * (0.85 + 0.3 * lying[..., None])
    every = int(random.integers(60, 140))
    for row in range(3):
        picture[row::every] *= 0.5  # the joints
    return picture.transpose(1, 0, 2) if length == height else picture


def checked(height: int, width: int, random: Random) -> Floats:
    """Return cloth with squares in two shades of one colour."""
    side = int(random.integers(14, 60))
    dark = (np.arange(width)[None] // side + np.arange(height)[:, None] // side) % 2 == 1
    light = random.uniform(120, 250, 3)
    return np.where(dark[..., None], light * random.uniform(0.5, 0.85, 3), light)


SCENES: dict[str, Callable[[int, int, Random], Floats]] = {
    "light wall": partial(wall, low=215, high=245),
    "coloured wall": partial(wall, low=90, high=220),
    "dark wall": partial(wall, low=20, high=60),
    "white boards": partial(boards, low=220, high=240),
    "dark boards": partial(boards, low=50, high=110),
    "checked cloth": checked,
}


def in_scene(pixels: Pixels, scene: str, random: Random) -> tuple[Image.Image, NDArray[np.bool_]]:
    """Return a test image as a photograph, and a mask of the garment in it.

    The garment is tinted, with the same luma. Its rim is fainter than the garment, because 28 x 28
    pixels give no sharper outline.

    Args:
        pixels: uint8 [28, 28].
        scene: one of SCENES.
        random: draws the tint, four margins, the scene, its light, the shadow and the noise.
    """
    smooth = partial(
        Image.Image.resize, size=(SCENE_SIDE, SCENE_SIDE), resample=Image.Resampling.BICUBIC
    )
    outline = smooth(Image.fromarray((pixels > 6).astype(np.uint8) * 255))
    outline = outline.filter(ImageFilter.GaussianBlur(5)).point(lambda v: (v - 118) * 12)
    luma = np.asarray(smooth(Image.fromarray(255 - pixels)), float)[..., None]
    tint = random.normal(size=3)
    tint -= tint @ LUMA
    tint *= random.uniform(0, 45) / np.abs(tint).max()
    left, top, right, bottom = (int(margin) for margin in random.integers(30, 220, 4))
    height, width = top + SCENE_SIDE + bottom, left + SCENE_SIDE + right
    place = slice(top, top + SCENE_SIDE), slice(left, left + SCENE_SIDE)
    share = np.zeros((height, width, 1))
    share[place] = np.asarray(outline, float)[..., None] / 255
    garment = np.zeros((height, width, 3))
    garment[place] = (luma + tint * np.minimum(luma, 255 - luma) / 128) * random.uniform(0.85, 1)
    cast = Image.fromarray((share[..., 0] * 255).astype(np.uint8))
    shadow = np.asarray(cast.filter(ImageFilter.GaussianBlur(14)), float)[..., None] / 255
    shadow = np.roll(shadow, (random.integers(4, 18), random.integers(-14, 14)), (0, 1))
    ground = SCENES[scene](height, width, random) * (1 - random.uniform(0.1, 0.35) * shadow)
    picture = ground * (1 - share) + garment * share + random.normal(0, 2, (height, width, 1))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), share[..., 0] > 0.5


def measure(
    images: Pixels,
    labels: Pixels,
    classifiers: tuple[Classifier, Classifier],
    ground: str,
    format_: str,
) -> Row:
    """Lay out, convert and classify all images.

    Args:
        images: uint8 [n, 28, 28].
        labels: uint8 [n].
        classifiers: of the images themselves, and of converted pictures.
        ground: one of GROUNDS or SCENES.
        format_: one of FORMATS; JPEG at quality 85.
    """
    random = np.random.default_rng(0)
    converted, seconds = np.empty_like(images), []
    for index, image in enumerate(images):
        if ground in SCENES:
            picture, _ = in_scene(image, ground, random)
        else:
            picture = enlarged(image, ground, index % 2 == 1, random)
        file = io.BytesIO()
        picture.save(
            file, format_, **({"quality": 85} if format_ == "JPEG" else {"compress_level": 1})
        )
        begin = perf_counter()
        converted[index] = read_picture(file.getvalue()).pixels
        seconds.append(perf_counter() - begin)
    native, accuracy = (
        _accuracy(classifier, some, labels)
        for classifier, some in zip(classifiers, (images, converted), strict=True)
    )
    milliseconds = 1000 * float(np.median(seconds))
    return Row(ground, format_, accuracy, 100 * (native - accuracy), milliseconds)


def _accuracy(classifier: Classifier, images: Pixels, labels: Pixels) -> float:
    probabilities = classifier.probabilities(np.ascontiguousarray(images[:, None]))
    return float((probabilities.argmax(axis=1) == labels).mean())


@click.command()
@click.argument("count", type=click.IntRange(1, 10_000), default=10_000)
@click.option("--scenes/--no-scenes", default=True, help="Lay garments into scenes as well.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure the photographs in this folder instead.",
)
@click.option(
    "--half",
    type=click.Choice(["development", "report", "all"]),
    default="development",
    show_default=True,
    help="The senders of the folder: for development, or for the reported figures.",
)
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save a contact sheet of the folder's photographs as PNG.",
)
def main(
    count: int, scenes: bool, folder: Path | None, half: photo_folder.Half, sheet: Path | None
) -> None:
    """Convert the first COUNT test images back from photographs, and print the loss of accuracy.

    Scenes use the first 1,000 images at most. The last line repeats the table as JSON.
    """
    configure_pillow()
    classifiers = load_classifiers(Settings().model_paths)
    if folder is not None:
        photo_folder.measure(folder, half, sheet, classifiers[1])
        return
    try:
        test = load().test
    except DatasetError as exc:
        raise click.ClickException(str(exc)) from exc
    layouts = [(count, ground, format_) for ground, format_ in product(GROUNDS, FORMATS)]
    if scenes:
        layouts += [(min(count, SCENE_IMAGES), scene, "JPEG") for scene in SCENES]
    click.echo("| background | file | images | accuracy | points lost | ms a picture |")
    click.echo("|---|---|---|---|---|---|")
    rows = []
    for n, ground, format_ in layouts:
        row = measure(test.images[:n], test.labels[:n], classifiers, ground, format_)
        cells = f"{row.accuracy:.4f} | {row.loss:.2f} | {row.milliseconds:.1f}"
        click.echo(f"| {ground} | {format_} | {n:,} | {cells} |")
        rows.append(asdict(row))
    click.echo(json.dumps({"count": count, "rows": rows}))


if __name__ == "__main__":
    main()
