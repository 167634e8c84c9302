"""What converting photographs costs in accuracy, measured on enlargements of the real test images.

Each test image is enlarged 10 to 25 times, in blocks or smoothly in turn, and laid with uneven
margins on white or on black; the service's conversion must find it again. Run by hand:
`python -m benchmarks.photos [COUNT]`.
"""

import io
import json
import sys
from dataclasses import asdict, dataclass
from itertools import product
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.classifier import Classifier
from service.image import decode
from service.settings import Settings
from training.dataset import load

Pixels = NDArray[np.uint8]
GROUNDS = ("white", "black")
FORMATS = ("PNG", "JPEG")


@dataclass(frozen=True)
class Row:
    """One way to lay out the test images, and what became of them.

    Attributes:
        ground: the background, "white" with the image negated or "black" with the image as it is.
        format: the file format.
        accuracy: the share classified rightly after the conversion.
        loss: points of accuracy lost against the test images themselves.
        milliseconds: a conversion's median time.
    """

    ground: str
    format: str
    accuracy: float
    loss: float
    milliseconds: float


def enlarged(
    pixels: Pixels,
    ground: str,
    format_: str,
    resampling: Image.Resampling,
    random: np.random.Generator,
) -> bytes:
    """Return a test image as the file of a large picture.

    Args:
        pixels: uint8 [28, 28].
        ground: one of GROUNDS.
        format_: one of FORMATS; JPEG at quality 85.
        resampling: how to enlarge.
        random: draws the scale, 10 to 25, and four margins of up to half the garment's side.
    """
    side = 28 * int(random.integers(10, 26))
    left, top, right, bottom = (int(margin) for margin in random.integers(0, side // 2, 4))
    white = ground == "white"
    garment = Image.fromarray(255 - pixels if white else pixels)
    picture = Image.new("L", (left + side + right, top + side + bottom), 255 if white else 0)
    picture.paste(garment.resize((side, side), resampling), (left, top))
    file = io.BytesIO()
    picture.save(file, format_, **({"quality": 85} if format_ == "JPEG" else {"compress_level": 1}))
    return file.getvalue()


def measure(
    images: Pixels, labels: Pixels, classifier: Classifier, ground: str, format_: str
) -> Row:
    """Enlarge, convert and classify each of the images.

    Args:
        images: uint8 [n, 28, 28].
        labels: uint8 [n].
        classifier: the model.
        ground: one of GROUNDS.
        format_: one of FORMATS.
    """
    random = np.random.default_rng(0)
    converted, seconds = np.empty_like(images), []
    for index, image in enumerate(images):
        resampling = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)[index % 2]
        data = enlarged(image, ground, format_, resampling, random)
        begin = perf_counter()
        converted[index] = decode(data).pixels
        seconds.append(perf_counter() - begin)
    accuracy, native = (_accuracy(classifier, some, labels) for some in (converted, images))
    milliseconds = 1000 * float(np.median(seconds))
    return Row(ground, format_, accuracy, 100 * (native - accuracy), milliseconds)


def _accuracy(classifier: Classifier, images: Pixels, labels: Pixels) -> float:
    probabilities = classifier.probabilities(np.ascontiguousarray(images[:, None]))
    return float((probabilities.argmax(axis=1) == labels).mean())


def main() -> None:
    """Print the table, and the same as a JSON line."""
    test = load().test
    count = int(sys.argv[1]) if len(sys.argv) > 1 else len(test.images)
    images, labels = test.images[:count], test.labels[:count]
    classifier = Classifier.load(Settings().model_path)
    native = _accuracy(classifier, images, labels)
    print(f"{count:,} test images, native accuracy {native:.4f}\n")
    print("| background | file | accuracy | points lost | ms a picture |")
    print("|---|---|---|---|---|")
    rows = []
    for ground, format_ in product(GROUNDS, FORMATS):
        row = measure(images, labels, classifier, ground, format_)
        cells = f"{row.accuracy:.4f} | {row.loss:.2f} | {row.milliseconds:.1f}"
        print(f"| {ground} | {format_} | {cells} |", flush=True)
        rows.append(asdict(row))
    print(json.dumps({"count": count, "native": native, "rows": rows}))


if __name__ == "__main__":
    main()
