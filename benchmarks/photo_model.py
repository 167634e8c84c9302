"""Fits `models/bn_lenet_photos.onnx`, the model for converted pictures; run by hand.

    python -m benchmarks.photo_model DIR

DIR is a folder of labelled photographs, as `benchmarks/photo_folder.py` reads it. Only single
objects of its development half are used. The fit starts from the committed network and goes on with
pictures that the service's own code has converted: enlarged training images, training images laid
into scenes, and the photographs; and with training images as they are.
"""

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import cos, pi
from pathlib import Path

import click
import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from rich.progress import track
from torch import Tensor

from benchmarks.photo_folder import read_folder
from benchmarks.photos import SCENES, in_scene
from service.pictures.conversion import WORKING_SIDE, convert, read_picture
from service.pictures.decoding import configure_pillow, reduced
from service.settings import MODEL, PICTURE_MODEL
from training.dataset import CLASS_NAMES, DatasetError, Split, load
from training.export import Provenance, export
from training.fitting.augmentation import Augmentation
from training.fitting.run import Run
from training.model import BNLeNet

Pixels = NDArray[np.uint8]
Random = np.random.Generator

ENLARGED, IN_SCENES, BAGS_IN_SCENES, COPIES = 12_000, 1_600, 900, 12
BAG = CLASS_NAMES.index("Bag")
STEPS, RATE, WARM_UP, AVERAGING = 1500, 1e-3, 0.1, 0.998
BATCH = {"enlarged": 126, "scenes": 46, "native": 65, "photographs": 19}
SMOOTHING = 0.1  # of the photographs' labels
SHARE = 0.75  # of the new weights in the mixture with the committed ones
BICUBIC = Image.Resampling.BICUBIC
FILTERS = [Image.Resampling.NEAREST, BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS]
# Photographs vary more than the pictures that are made from training images.
OF_PHOTOGRAPHS = Augmentation(
    flip=True,
    shift=2,
    rotation=12,
    scale=0.12,
    sharpness=0.7,
    contrast=0.3,
    brightness=0.3,
    gamma=0.3,
)
OF_IMAGES = Augmentation(
    flip=True,
    shift=1,
    rotation=3,
    scale=0.03,
    sharpness=0.7,
    sharpness_share=0.15,
    contrast=0.2,
    brightness=0.2,
    gamma=0.1,
)


def as_jpeg(picture: Image.Image, random: Random) -> Pixels:
    """Convert a picture that was saved as JPEG at a quality from 70 to 95."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(random.integers(70, 96)))
    return read_picture(file.getvalue(), "dataset").pixels


def converted(picture: Image.Image, random: Random) -> Pixels:
    """Convert a picture, half the time after JPEG."""
    if random.random() < 0.5:
        return convert(reduced(picture, WORKING_SIDE))[0]
    return as_jpeg(picture, random)


def enlarged(pixels: Pixels, random: Random) -> Image.Image:
    """Lay an image, 4 to 26 times larger, on white, black or grey; turn one in five."""
    side = int(28 * (random.uniform(10, 26) if random.random() < 0.7 else random.uniform(4, 14)))
    left, top, right, bottom = (int(m) for m in random.integers(0, side // 2, 4))
    ground = random.choice([255, 0, int(random.integers(60, 245))], p=[0.42, 0.38, 0.2])
    picture = Image.new("L", (left + side + right, top + side + bottom), int(ground))
    image, outline, kind = Image.fromarray(255 - pixels), None, FILTERS[random.integers(4)]
    if ground == 0:
        image = Image.fromarray(pixels)
    elif ground < 255:  # on grey, only the garment is laid
        outline = Image.fromarray((pixels > 6).astype(np.uint8) * 255).resize((side, side), BICUBIC)
        outline = outline.filter(ImageFilter.GaussianBlur(side / 84))
        outline = outline.point(lambda value: (value - 118) * 12)
    picture.paste(image.resize((side, side), kind), (left, top), outline)
    if random.random() < 0.2:
        picture = picture.rotate(
            random.uniform(-10, 10), BICUBIC, expand=True, fillcolor=int(ground)
        )
    return picture


def trimmed(
    picture: Image.Image, left: float, top: float, right: float, bottom: float
) -> Image.Image:
    """Cut off these shares of the width and the height."""
    width, height = picture.size
    return picture.crop(
        (int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height))
    )


def varied(photo: Image.Image, random: Random) -> Image.Image:
    """Trim, scale, turn (by up to 12°) and mirror a photograph, and change its light."""
    photo = trimmed(photo, *random.uniform(0, 0.1, 4))
    photo.thumbnail((int(random.uniform(160, 480)),) * 2, Image.Resampling.BOX)
    angle = random.uniform(-12, 12)
    empty = 0.5 * min(np.sin(np.radians(abs(angle))), 0.13)  # the corners that the turn leaves
    photo = trimmed(photo.rotate(angle, Image.Resampling.BILINEAR), empty, empty, empty, empty)
    if random.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change, limit in (
        (ImageEnhance.Brightness, 0.25),
        (ImageEnhance.Contrast, 0.25),
        (ImageEnhance.Color, 0.5),
    ):
        photo = change(photo).enhance(random.uniform(1 - limit, 1 + limit))
    return photo


def make_pictures(folder: Path, train: Split) -> dict[str, NDArray[np.integer]]:
    """Make and convert all pictures; "..._rows" are the numbers of their training images."""
    random = np.random.default_rng(0)
    order = random.permutation(len(train.labels))
    bags = order[train.labels[order] == BAG][:BAGS_IN_SCENES]
    rows = {"enlarged": order[:ENLARGED], "scenes": np.concatenate([order[-IN_SCENES:], bags])}

    def scene(pixels: Pixels) -> Image.Image:
        return in_scene(pixels, str(random.choice(list(SCENES))), random)[0]

    draw: dict[str, Callable[[Pixels], Image.Image]] = {
        "enlarged": partial(enlarged, random=random),
        "scenes": scene,
    }
    made: dict[str, NDArray[np.integer]] = {f"{name}_rows": some for name, some in rows.items()}
    for name, some in rows.items():
        images = (draw[name](train.images[row]) for row in track(some, f"converting {name}"))
        made[name] = np.stack([converted(image, random) for image in images])
    photos = [p for p in read_folder(folder, CLASS_NAMES) if p.half == "development" and not p.pair]
    copies = []
    for photo in track(photos, "converting photographs"):
        with Image.open(photo.path) as file:
            image = file.convert("RGB")
        own = [read_picture(photo.path.read_bytes(), "dataset").pixels]
        copies.append(own + [as_jpeg(varied(image, random), random) for _ in range(COPIES)])
    made["photographs"] = np.array(copies)
    made["labels"] = np.array([photo.label for photo in photos])
    return with_bags(made)


def with_bags(made: dict[str, NDArray[np.integer]]) -> dict[str, NDArray[np.integer]]:
    """Let bags in scenes stand in for photographs of bags, if there are none.

    Without them, a network that is fitted to photographs answers "Bag" too seldom.
    """
    versions = COPIES + 1
    bags = made["scenes"][IN_SCENES:]
    count = len(bags) // versions
    if BAG in made["labels"] or count == 0:
        return made
    stand_ins = bags[: count * versions].reshape(count, versions, 28, 28)
    return made | {
        "photographs": np.concatenate([made["photographs"], stand_ins]),
        "labels": np.concatenate([made["labels"], np.full(count, BAG)]),
    }


def as_input(pixels: Tensor) -> Tensor:
    """Return uint8 [n, 28, 28] as the network's input, float32 [n, 1, 28, 28] from 0 to 1."""
    return pixels[:, None].float() / 255


@torch.no_grad()
def move(model: BNLeNet, towards: BNLeNet, share: float) -> None:
    """Move a model's weights and statistics towards another's."""

    def floats(one: BNLeNet) -> Iterator[Tensor]:
        return (tensor for tensor in one.state_dict().values() if tensor.is_floating_point())

    for own, other in zip(floats(model), floats(towards), strict=True):
        own.lerp_(other, share)


def fine_tune(
    start: BNLeNet, made: dict[str, NDArray[np.integer]], train: Split, seed: int
) -> BNLeNet:
    """Fit a copy of `start` with its fixed statistics; return its average, mixed with `start`.

    The target of a training image is what `start` answers to the image itself, so that its answers
    change little; the target of a photograph is its label.

    Args:
        start: in evaluation mode.
        made: as `make_pictures` returns it.
        train: the training images.
        seed: of all random choices.
    """
    random = torch.Generator().manual_seed(seed)
    images, labels = torch.from_numpy(train.images), torch.from_numpy(made["labels"]).long()
    pools = {name: torch.from_numpy(made[name]) for name in ("enlarged", "scenes", "photographs")}
    with torch.no_grad():
        answers = torch.cat([start(as_input(some)) for some in torch.split(images, 1000)]).softmax(
            1
        )
    rarity = torch.bincount(labels, minlength=10).float()[labels] ** -0.5
    model, average = copy.deepcopy(start).requires_grad_(True), copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    for step in track(range(STEPS), "fitting"):
        warm = min(1, (step + 1) / (WARM_UP * STEPS))
        optimizer.param_groups[0]["lr"] = RATE * warm * 0.5 * (1 + cos(pi * step / STEPS))
        parts, rows = [], []
        for name in ("enlarged", "scenes"):
            drawn = torch.randint(len(pools[name]), (BATCH[name],), generator=random)
            parts.append(pools[name][drawn])
            rows.append(torch.from_numpy(made[f"{name}_rows"])[drawn])
        drawn = torch.randint(len(images), (BATCH["native"],), generator=random)
        parts.append(images[drawn])
        rows.append(drawn)
        # In random order, because Augmentation sharpens the first images of a batch.
        order = torch.randperm(sum(map(len, rows)), generator=random)
        made_images = OF_IMAGES(as_input(torch.cat(parts)[order]), random)
        count = BATCH["photographs"]
        chosen = torch.multinomial(rarity, count, replacement=True, generator=random)
        version = torch.randint(pools["photographs"].shape[1], (count,), generator=random)
        photographs = OF_PHOTOGRAPHS(as_input(pools["photographs"][chosen, version]), random)
        truth = F.one_hot(labels[chosen], 10) * (1 - SMOOTHING) + SMOOTHING / 10
        target = torch.cat([answers[torch.cat(rows)[order]], truth])
        loss = F.cross_entropy(model(torch.cat([made_images, photographs])), target)
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        optimizer.step()
        move(average, model, 1 - min(AVERAGING, step / (step + 1)))
    mixed = copy.deepcopy(start)
    move(mixed, average, SHARE)
    return mixed


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=PICTURE_MODEL,
    help="The file to write.",
)
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, out: Path, seed: int) -> None:
    """Fit the model for converted pictures with the photographs in FOLDER (about 8 minutes)."""
    configure_pillow()
    try:
        data, run = load(), Run(MODEL.parent / "run")
    except DatasetError as exc:
        raise click.ClickException(str(exc)) from exc
    committed = {entry.key: entry.value for entry in onnx.load(MODEL).metadata_props}
    provenance = Provenance.of(run.config(), committed["statistics"])
    start = run.model(provenance.statistics)
    tuned = fine_tune(start, make_pictures(folder, data.train), data.train, seed)
    recipe = f"{provenance.recipe}, then fitted to converted pictures"
    source = replace(provenance, recipe=recipe, seed=seed)
    report = export(tuned, source, data.test, out, temperature=float(committed["temperature"]))
    click.echo(f"{out}: SHA-256 {report.sha256}; test accuracy {report.test_accuracy:.4f}")


if __name__ == "__main__":
    main()
