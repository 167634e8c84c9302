"""Cut-outs are compared with the places where the test put the garments."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from benchmarks.photos import SCENES, in_scene
from service.pictures.cutout import Cutout, cut_out, eroded
from training.dataset import FashionMNIST

Mask = NDArray[np.bool_]
NOT_PLAIN = {"white boards", "dark boards", "checked cloth"}


def coat(shape: tuple[int, int] = (160, 120)) -> Mask:
    """Return a shape with sleeves, in the middle."""
    mask = np.zeros(shape, np.bool_)
    mask[30:130, 40:80] = True
    mask[35:60, 20:100] = True
    return mask


def laid(
    mask: Mask, background: int | NDArray[np.int_] = 235, garment: int = 60
) -> NDArray[np.uint8]:
    picture = np.empty((*mask.shape, 3), np.int16)
    picture[:] = np.asarray(background)[..., None]
    picture[mask] = garment
    noise = np.random.default_rng(0).integers(-2, 3, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def overlap(cutout: Cutout | None, mask: Mask) -> float:
    """Return intersection over union."""
    assert cutout is not None
    return float((cutout.mask & mask).sum() / (cutout.mask | mask).sum())


def ends(cutout: Cutout | None, mask: Mask) -> int:
    """Return the largest difference between the extents, in pixels."""
    assert cutout is not None
    differences = []
    for axis in (0, 1):
        found, true = (np.flatnonzero(each.any(axis)) for each in (cutout.mask, mask))
        differences += [abs(found[0] - true[0]), abs(found[-1] - true[-1])]
    return int(max(differences))


@pytest.mark.parametrize("scene", SCENES)
def test_real_garments_are_found_in_scenes(scene: str, fashion_mnist: FashionMNIST) -> None:
    random = np.random.default_rng(0)
    overlaps = []
    for pixels in fashion_mnist.test.images[:20]:
        picture, where = in_scene(pixels, scene, random)
        small = picture.resize((picture.width // 4, picture.height // 4), Image.Resampling.BOX)
        truth = np.asarray(Image.fromarray(where).resize(small.size))
        found = cut_out(np.asarray(small))
        overlaps.append(overlap(found, truth))
        if scene not in NOT_PLAIN:
            assert found is not None
            assert found.plain
    assert np.median(overlaps) > (0.6 if scene == "dark boards" else 0.8)


def ground(*places: tuple[slice, slice], level: int = 30) -> NDArray[np.int_]:
    """Return a light background with darker areas."""
    picture = np.full((160, 120), 235)
    for place in places:
        picture[place] = level
    return picture


ALL = slice(None)


@pytest.mark.parametrize(
    "others",
    [
        ground((slice(20, None, 37), ALL), level=90),
        ground((slice(135, None), slice(90, None)), (slice(0, 12), slice(0, 40))),
        ground((slice(145, 153), slice(50, 58))),
    ],
    ids=["joints between boards", "things that the border cuts off", "a small thing below"],
)
def test_other_objects_are_not_part_of_the_garment(others: NDArray[np.int_]) -> None:
    mask = coat()
    found = cut_out(laid(mask, others))
    assert overlap(found, mask) > 0.9
    assert ends(found, mask) <= 2


def test_dust_near_the_garment_is_not_part_of_it() -> None:
    dusty = ground((slice(100, 102), slice(25, 27)))  # under a sleeve
    found = cut_out(laid(coat(), dusty))
    assert found is not None
    assert not found.mask[95:107, 20:32].any()


def test_a_separate_part_near_the_garment_is_kept() -> None:
    mask = coat()
    mask[:, 36:39] = False  # a sleeve's seam, as light as the background
    found = cut_out(laid(mask))
    assert found is not None
    assert found.mask[40:55, 22:34].all()


def test_a_garment_that_covers_a_thirtieth_of_the_picture_is_found() -> None:
    mask = np.zeros((160, 120), np.bool_)
    mask[60:86, 50:75] = True
    assert overlap(cut_out(laid(mask)), mask) > 0.9


def test_both_shoes_of_a_pair_are_kept() -> None:
    mask = np.zeros((120, 160), np.bool_)
    mask[40:80, 20:70] = mask[40:80, 90:140] = True
    assert overlap(cut_out(laid(mask)), mask) > 0.9


def test_a_garment_that_the_picture_cuts_off_is_kept() -> None:
    mask = np.zeros((160, 120), np.bool_)
    mask[40:, 20:100] = True  # down to the border and beyond
    assert overlap(cut_out(laid(mask)), mask) > 0.9


def test_a_garment_with_only_a_visible_edge_is_filled() -> None:
    """A dark coat on a dark wall: only its lit edge differs from the background."""
    mask = coat()
    rim = mask.copy()
    rim[1:-1, 1:-1] &= ~(mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:])
    thick = rim.copy()
    thick[1:] |= rim[:-1]
    thick[:, 1:] |= rim[:, :-1]
    found = cut_out(laid(thick & mask, np.full(mask.shape, 40), garment=160))
    assert overlap(found, mask) > 0.9


def test_the_handle_of_a_bag_is_open() -> None:
    mask = np.zeros((160, 120), np.bool_)
    mask[20:140, 20:100] = True
    hole = np.zeros_like(mask)
    hole[30:70, 40:80] = True
    found = cut_out(laid(mask & ~hole))
    assert found is not None
    assert not found.mask[35:65, 45:75].any()


@pytest.mark.parametrize("shape", [(7, 100), (100, 7), (1, 1)])
def test_a_very_narrow_picture_has_no_cutout(shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, np.bool_)
    mask[shape[0] // 4 : -shape[0] // 4, shape[1] // 4 : -shape[1] // 4] = True
    assert cut_out(laid(mask)) is None


def test_a_picture_of_one_colour_has_no_cutout() -> None:
    assert cut_out(laid(np.zeros((100, 100), np.bool_))) is None


@pytest.mark.parametrize("radius", [1, 2, 3, 5, 8])
def test_erosion_keeps_pixels_whose_whole_neighbourhood_is_in_the_mask(radius: int) -> None:
    mask = np.random.default_rng(0).random((40, 30)) < 1 - 0.3 / radius**2
    beyond = np.pad(mask, radius, mode="edge")
    windows = sliding_window_view(beyond, (2 * radius + 1, 2 * radius + 1))
    expected = windows.all(axis=(2, 3))
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(eroded(mask, radius), expected)


def test_a_pattern_of_blocks_is_not_a_garment() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    assert cut_out(colours.repeat(4, axis=0).repeat(4, axis=1)) is None
