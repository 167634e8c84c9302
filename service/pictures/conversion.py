"""Converts pictures to the model's 28x28 pixels, the way Fashion-MNIST was made.

The steps are in Xiao, Rasul and Vollgraf, 2017, arXiv 1708.07747, section 2. This file uses
neither HTTP nor the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidInput
from service.pictures.cutout import cut_out, eroded, larger_of_two
from service.pictures.decoding import (
    gray_pixels,
    is_animated,
    is_gray_28x28,
    open_picture,
    reduced,
)

SIDE = 28
WORKING_SIDE = 160  # pixels; the cut-out runs at this size. 128 costs a point of accuracy
Preprocessing = Literal["auto", "none", "dataset"]
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

# In grey levels, 0 to 255.
MIN_CONTRAST = 4  # with less, a picture has one colour
BLACK = 16  # a darker background counts as black
# Garments photographed on black are darker than this; the data set's own images are brighter.
BRIGHT = 190
EDGE = 2  # pixels; in so wide an edge, the background may shine through
# The model is unsure when the picture or its mirror image gives the answer's class less. Among the
# public photographs of single garments on light backgrounds, 75 % get more (docs/performance.md).
UNSURE_BELOW = 0.5

# The page shows no verdict where a note begins with "Not sure".
ONE_COLOUR = "Not sure: the picture has only one colour."
NO_GARMENT = "Not sure: no garment stands out from the background; the whole picture was used."
TWO_OBJECTS = "Not sure: the picture shows two objects; the larger was used. Send one."
UNSURE = "Not sure: the picture or its mirror image gives this class a probability below one half."
GUESSED = "The background is not plain; the garment's outline was guessed from its colours."
ON_BLACK = "The background is black, as in the data set, so light and dark were not swapped."
FIRST_FRAME = "Only the first frame was used."


@dataclass(frozen=True)
class ModelInput:
    """The pixels that the model sees, and how they were made.

    Attributes:
        pixels: uint8 [28, 28], 0 = background, as in the data set.
        preprocessing: "none" for pixels as sent, "dataset" for a converted picture.
        notes: one sentence for each guess or problem. If a note begins with "Not sure", do not
            rely on the answer.
    """

    pixels: Pixels
    preprocessing: Literal["none", "dataset"]
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> NDArray[np.uint8]:
        """The model's input, uint8 [n, 1, 28, 28]; a converted picture adds its mirror image."""
        image = self.pixels.reshape(1, 1, SIDE, SIDE)
        return image if self.preprocessing == "none" else np.concatenate([image, image[..., ::-1]])

    def notes_for(self, probabilities: Floats) -> tuple[str, ...]:
        """Return the notes; add one if the model is unsure and no note says "Not sure" yet.

        A garment and its mirror image have the same class. The model is unsure if one of them
        gives that class a low probability.

        Args:
            probabilities: float32 [n, 10], of `images`; the first row is the answer.
        """
        lowest = probabilities[:, probabilities[0].argmax()].min()
        doubted = any(note.startswith("Not sure") for note in self.notes)
        if self.preprocessing == "none" or lowest >= UNSURE_BELOW or doubted:
            return self.notes
        return (*self.notes, UNSURE)


@dataclass(frozen=True)
class Garment:
    """The garment in a picture, in the data set's grey levels, before it is scaled.

    Attributes:
        gray: float32 [height, width], 0 to 255, 0 = background.
        mask: bool [height, width], true on the garment.
        notes: as in `ModelInput`.
    """

    gray: Floats
    mask: NDArray[np.bool_]
    notes: tuple[str, ...] = ()


def read_picture(
    data: bytes, preprocessing: Preprocessing = "auto", *, limited: bool = True
) -> ModelInput:
    """Decode a picture, and convert it to the data set's form if asked or needed.

    Args:
        data: the whole file; the format is read from its content.
        preprocessing: "none" takes only 28x28 8-bit grayscale; "dataset" converts every picture;
            "auto" takes a 28x28 picture without colours as it is, and converts all others. A
            picture with an EXIF orientation is turned upright in all three.
        limited: whether to apply the service's limits (`service.pictures.decoding`).

    Raises:
        UnsupportedMediaType: the bytes are not a picture of a known format.
        PayloadTooLarge: the picture exceeds a limit of `service.pictures.decoding`.
        InvalidInput: the picture is damaged; or "none" was asked, and it is not 28x28 grayscale.
        Overloaded: there is too little memory.
    """
    image = open_picture(data, limited=limited)
    fits = is_gray_28x28(image)
    if preprocessing == "none" and not fits:
        raise InvalidInput(
            f"The picture is {image.width} x {image.height} in mode {image.mode}; send 28 x 28 in"
            " 8-bit grayscale, or choose another preprocessing."
        )
    if fits and preprocessing != "dataset":
        return ModelInput(gray_pixels(image), "none")
    original_size = image.size
    small = reduced(image, WORKING_SIDE)
    if preprocessing == "auto" and original_size == (SIDE, SIDE):
        rgba = np.asarray(small.convert("RGBA"))
        if (rgba[..., 3] == 255).all() and (np.ptp(rgba[..., :3], axis=2) == 0).all():
            return ModelInput(rgba[..., 0].copy(), "none")
    pixels, notes = convert(small)
    if is_animated(image):
        notes += (FIRST_FRAME,)
    return ModelInput(pixels, "dataset", notes)


def convert(image: Image.Image) -> tuple[Pixels, tuple[str, ...]]:
    """Convert a small upright picture (RGB or RGBA) as the data set's authors did.

    The garment is cut out, scaled to 28 pixels on its longest edge, and centred. Its grey levels
    are negated and stretched to 255. The authors also sharpened their pictures; this does not,
    because no test became more accurate (docs/performance.md).

    Returns:
        pixels uint8 [28, 28], and the notes of `ModelInput`.
    """
    garment = find_garment(image)
    return _scaled_and_centred(garment.gray, garment.mask), garment.notes


def find_garment(image: Image.Image) -> Garment:
    """Find the garment in a small upright picture (RGB or RGBA).

    If there are two objects of similar size, such as a pair of shoes, take the larger one: the
    data set shows single objects.
    """
    garment = _by_transparency(image) or _by_colours(image)
    larger = larger_of_two(garment.mask)
    if larger is None:
        return garment
    return Garment(garment.gray, larger, (*garment.notes, TWO_OBJECTS))


def _by_transparency(image: Image.Image) -> Garment | None:
    """Return the opaque part of a picture that is partly transparent, else None."""
    if image.mode != "RGBA":
        return None
    opaque = np.asarray(image.getchannel("A")) > 127
    if not opaque.any() or opaque.mean() >= 0.99:
        return None
    negated = 255 - _gray(image)
    if negated[opaque].max() < MIN_CONTRAST:  # all white: only the shape is visible
        negated[:] = 255
    return Garment(negated, opaque)


def _by_colours(image: Image.Image) -> Garment:
    """Separate the garment from its background by colour."""
    if image.mode == "RGBA":
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image)
        image = on_white.convert("RGB")
    gray = _gray(image)
    everywhere = np.ones_like(gray, np.bool_)
    if np.ptp(gray) < MIN_CONTRAST:
        return Garment(np.zeros_like(gray), everywhere, (ONE_COLOUR,))
    background = float(np.median(np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])))
    cutout = cut_out(np.asarray(image))
    if cutout is None:
        height, width = gray.shape
        centre = gray[height // 4 : height - height // 4, width // 4 : width - width // 4]
        contrast = background - gray if centre.mean() < background else gray - background
        return Garment(contrast.clip(0), everywhere, (NO_GARMENT,))
    notes: tuple[str, ...] = () if cutout.plain else (GUESSED,)
    if background < BLACK and np.percentile(gray[cutout.mask], 99) > BRIGHT:
        # Bright on black: the picture is negated already, like the data set's images.
        return Garment(gray, cutout.mask, (*notes, ON_BLACK))
    negated, core = 255 - gray, eroded(cutout.mask, EDGE)
    if core.any() and gray[core].mean() > background:
        # A dark background shines through the edge; do not let the edge get brighter than the core.
        negated = np.minimum(negated, np.percentile(negated[core], 98))
    return Garment(negated, cutout.mask, notes)


def _gray(image: Image.Image) -> Floats:
    return np.asarray(image.convert("RGB").convert("L"), np.float32)


def _scaled_and_centred(gray: Floats, mask: NDArray[np.bool_]) -> Pixels:
    """Scale the garment under the mask to 28 pixels, centre it, and stretch it to 255."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = SIDE / max(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    garment = Image.fromarray(gray * mask)
    small = garment.resize((width, height), Image.Resampling.BOX, box=box)
    # If a margin is odd, the extra pixel is above or on the left, as in the data set.
    top, left = (SIDE - height + 1) // 2, (SIDE - width + 1) // 2
    pixels = np.zeros((SIDE, SIDE), np.float32)
    pixels[top : top + height, left : left + width] = np.asarray(small)
    pixels *= 255 / max(float(pixels.max()), 1)
    return pixels.round().astype(np.uint8)
