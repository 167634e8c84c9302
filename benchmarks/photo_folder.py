"""Measures the accuracy on a folder of photographs, by class and background; draws a contact sheet.

Run by hand: `python -m benchmarks.photos --folder DIR`. The class of a photograph is in
`photos.tsv`, if the folder has that file (columns: file, class_index, background, note with
"sender N" and "pair"). Otherwise the name of its folder, or the beginning of its own name, is a
number from 0 to 9 or the class's name. The photographs of half of the senders are for development,
those of the other half for the reported figures: choices are not judged on their own data.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import sqrt
from pathlib import Path
from time import process_time
from typing import Literal

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from service.errors import ServiceError
from service.model.classifier import Classifier
from service.pictures.conversion import WORKING_SIDE, find_garment, read_picture
from service.pictures.decoding import open_picture, reduced

Half = Literal["development", "report", "all"]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".heic"}
BORDER = 6  # pixels, in a picture of WORKING_SIDE, that show the background
BUSY_SPREAD = 25  # grey levels between the quartiles of the border; above, it is busy
LIGHT_LEVEL = 150  # median grey level of the border; above, it is light
CELL, LINE = 108, 13  # pixels: the side of a picture, and the height of a line of text
COLUMNS = 4


@dataclass(frozen=True)
class Photo:
    """A labelled photograph.

    Attributes:
        path: the file.
        label: the class's number.
        background: "light" (also cut out), "dark" or "busy".
        pair: whether it shows a pair of shoes; the data set has no pairs.
        half: "development" or "report"; the same for all photographs of a sender.
    """

    path: Path
    label: int
    background: str
    pair: bool
    half: str


@dataclass(frozen=True)
class Result:
    """The answer to a photograph.

    Attributes:
        photo: the photograph.
        probabilities: float32 [10]; None if the photograph was refused.
        pixels: uint8 [28, 28], the model's input; None if the photograph was refused.
        notes: the notes of the answer, or the refusal.
        milliseconds: processor time from bytes to pixels.
    """

    photo: Photo
    probabilities: NDArray[np.float32] | None
    pixels: NDArray[np.uint8] | None
    notes: tuple[str, ...]
    milliseconds: float

    @property
    def right(self) -> bool:
        """Whether the most probable class is the photograph's."""
        return self.probabilities is not None and (
            int(self.probabilities.argmax()) == self.photo.label
        )

    @property
    def sure(self) -> bool:
        """Whether the answer has no note that begins with "Not sure"."""
        return self.probabilities is not None and not any(
            note.startswith("Not sure") for note in self.notes
        )


def read_folder(folder: Path, classes: Sequence[str]) -> list[Photo]:
    """Return the labelled photographs of a folder.

    Raises:
        ValueError: a photograph has no class.
    """
    listed = folder / "photos.tsv"
    if listed.exists():
        with listed.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
        return [
            Photo(
                folder / row["file"],
                int(row["class_index"]),
                row["background"],
                "pair" in row["note"],
                _half(
                    match[0] if (match := re.search(r"sender \w+", row["note"])) else row["file"]
                ),
            )
            for row in rows
        ]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [
        Photo(
            path,
            _label(path, folder, classes),
            guess_background(path.read_bytes()),
            "pair" in str(path.relative_to(folder)).lower(),
            _half(path.name),
        )
        for path in paths
    ]


def guess_background(data: bytes) -> str:
    """Guess a background from a picture's border: "light" (also cut out), "dark" or "busy"."""
    try:
        small = reduced(open_picture(data, limited=False), WORKING_SIDE).convert("RGBA")
    except ServiceError:
        return "busy"
    gray, opaque = (np.asarray(small.convert("L")), np.asarray(small.getchannel("A")) > 127)
    rim = np.ones_like(opaque)
    rim[BORDER:-BORDER, BORDER:-BORDER] = False
    if not opaque[rim].all():
        return "light"
    low, middle, high = np.percentile(gray[rim], [25, 50, 75])
    if high - low > BUSY_SPREAD:
        return "busy"
    return "light" if middle > LIGHT_LEVEL else "dark"


def _half(sender: str) -> str:
    return ("development", "report")[
        hashlib.sha256(sender.removeprefix("sender ").encode()).digest()[0] % 2
    ]


def _label(path: Path, folder: Path, classes: Sequence[str]) -> int:
    names = [_plain(name) for name in classes]
    for text in (*path.relative_to(folder).parts[:-1][::-1], path.stem):
        if number := re.match(r"[0-9](?![0-9])", text):
            return int(number[0])
        for index, name in enumerate(names):
            if _plain(text).startswith(name):
                return index
    raise ValueError(f"{path} has no class: name its folder by one of {', '.join(classes)}.")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def classify(photos: Iterable[Photo], classifier: Classifier) -> list[Result]:
    """Classify photographs as the service does."""
    results = []
    for photo in photos:
        data = photo.path.read_bytes()
        begin = process_time()
        try:
            image = read_picture(data)
        except ServiceError as error:
            results.append(Result(photo, None, None, (error.message,), 0.0))
            continue
        milliseconds = 1000 * (process_time() - begin)
        probabilities = classifier.probabilities(image.images)
        notes = image.notes_for(probabilities)
        results.append(Result(photo, probabilities[0], image.pixels, notes, milliseconds))
    return results


def interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    half = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: the group of photographs.
        count: the number of photographs.
        right: the number of right answers.
        sure: the number of answers without a note that begins with "Not sure".
        right_of_sure: the number of right answers among these.
    """

    name: str
    count: int
    right: int
    sure: int
    right_of_sure: int

    @classmethod
    def of(cls, name: str, results: Sequence[Result]) -> "Row":
        """Count results."""
        sure = [result for result in results if result.sure]
        return cls(
            name,
            len(results),
            sum(result.right for result in results),
            len(sure),
            sum(result.right for result in sure),
        )

    def __str__(self) -> str:
        if not self.count:
            return f"| {self.name} | 0 | | | | |"
        low, high = interval(self.right, self.count)
        of_sure = f"{self.right_of_sure / self.sure:.2f}" if self.sure else ""
        return (
            f"| {self.name} | {self.count} | {self.right / self.count:.3f} |"
            f" {low:.2f} to {high:.2f} | {self.sure / self.count:.2f} | {of_sure} |"
        )


def rows(results: Sequence[Result], classes: Sequence[str]) -> list[Row]:
    """Return the rows of a table: single objects by background and by class, pairs, all."""
    single = [result for result in results if not result.photo.pair]
    pairs = [result for result in results if result.photo.pair]
    by: list[tuple[str, Callable[[Photo], bool]]] = [
        *((ground, lambda p, g=ground: p.background == g) for ground in ("light", "dark", "busy")),
        *((name, lambda p, n=i: p.label == n) for i, name in enumerate(classes)),
    ]
    lines = [Row.of(name, [r for r in single if chosen(r.photo)]) for name, chosen in by]
    return [
        *(line for line in lines if line.count),
        Row.of("single objects", single),
        Row.of("pairs of shoes", pairs),
        Row.of("all", results),
    ]


def contact_sheet(results: Sequence[Result], classes: Sequence[str]) -> Image.Image:
    """Draw the photographs, their cut-outs, the model's input and the three likeliest classes."""
    width, height = 4 * CELL + 20, CELL + 8
    lines = -(-len(results) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, max(1, lines) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, result in enumerate(results):
        left, top = index % COLUMNS * width, index // COLUMNS * height
        if result.pixels is not None:
            small = reduced(open_picture(result.photo.path.read_bytes()), WORKING_SIDE)
            cutout = np.array(small.convert("RGB"))
            cutout[~find_garment(small).mask] = (255, 0, 255)
            for column, image in enumerate((small.convert("RGB"), Image.fromarray(cutout))):
                image.thumbnail((CELL - 4, CELL))
                sheet.paste(image, (left + column * CELL, top))
            seen = Image.fromarray(result.pixels).resize(
                (CELL - 4, CELL - 4), Image.Resampling.NEAREST
            )
            sheet.paste(seen, (left + 2 * CELL, top))
        draw.text((left + 3 * CELL, top), result.photo.path.stem[:20], fill="black")
        for line, (text, colour) in enumerate(_lines(result, classes), 1):
            draw.text((left + 3 * CELL, top + line * LINE), text, fill=colour)
    return sheet


def _lines(result: Result, classes: Sequence[str]) -> list[tuple[str, str]]:
    shown = [(f"is {classes[result.photo.label]}", "black")]
    if result.probabilities is None:
        return [*shown, *((note[i : i + 20], "red") for note in result.notes for i in (0, 20, 40))]
    for index in result.probabilities.argsort()[::-1][:3]:
        colour = "green" if index == result.photo.label else "red"
        shown.append((f"{classes[index]} {result.probabilities[index]:.2f}", colour))
    return shown if result.sure else [*shown, ("not sure", "gray")]


def measure(folder: Path, half: Half, sheet: Path | None, classifier: Classifier) -> None:
    """Print the table of a folder, save its contact sheet, and print the figures as JSON."""
    classes = classifier.info.classes
    photos = [p for p in read_folder(folder, classes) if half in ("all", p.half)]
    results = classify(photos, classifier)
    click.echo(f"| {half} | photographs | right | 95 % interval | answered | right of these |")
    click.echo("|---|---|---|---|---|---|")
    table = rows(results, classes)
    for row in table:
        click.echo(str(row))
    refused = [result for result in results if result.probabilities is None]
    for note, group in groupby(sorted(refused, key=lambda r: r.notes), key=lambda r: r.notes[0]):
        click.echo(f"refused: {len(list(group))}: {note}")
    if sheet is not None:
        contact_sheet(results, classes).save(sheet)
    milliseconds = float(np.median([r.milliseconds for r in results])) if results else 0.0
    click.echo(f"\nbytes to pixels, median processor time: {milliseconds:.1f} ms")
    counted = {row.name: [row.right, row.count, row.right_of_sure, row.sure] for row in table}
    click.echo(json.dumps({"half": half, "refused": len(refused), "rows": counted}))
