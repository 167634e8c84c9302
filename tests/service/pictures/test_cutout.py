"""Cut-outs are compared with the places where the test put the garments."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from benchmarks.photos import SCENES, in_scene
from service.pictures.cutout import Cutout, cut_out, eroded, larger_of_two
from training.dataset import FashionMNIST

Mask = NDArray[np.bool_]
NOT_PLAIN = {"white boards", "dark boards", "checked cloth"}
# The mean overlap of twenty images, less 0.02. Other constants of the cut-out give less.
MEANS = {
    "light wall": 0.858,
    "coloured wall": 0.861,
    "dark wall": 0.861,
    "white boards": 0.835,
    "dark boards": 0.86,
    "checked cloth": 0.885,
}


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
        overlaps.append(0 if found is None else overlap(found, truth))
        if scene not in NOT_PLAIN:
            assert found is not None
            assert found.plain
    assert np.mean(overlaps) > MEANS[scene]


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


# What the limits are for: a case on each side of each of them, less than twice as far apart.


def box(*places: tuple[slice, slice], shape: tuple[int, int] = (160, 120)) -> Mask:
    mask = np.zeros(shape, np.bool_)
    for place in places:
        mask[place] = True
    return mask


@pytest.mark.parametrize(("side", "area", "found"), [(12, 0.0075, False), (16, 0.0133, True)])
def test_a_garment_covers_a_hundredth_of_the_picture(side: int, area: float, found: bool) -> None:
    mask = box(np.s_[60 : 60 + side, 50 : 50 + side])
    assert mask.mean() == pytest.approx(area, abs=1e-4)
    cutout = cut_out(laid(mask))
    assert (cutout is not None) == found


def test_a_garment_may_leave_two_pixels_on_every_side() -> None:
    """The border to which the background is fitted is three pixels thick."""
    mask = box(np.s_[2:-2, 2:-2])
    assert overlap(cut_out(laid(mask)), mask) == 1


def test_a_garment_may_cover_two_fifths_of_the_rim() -> None:
    mask = box(np.s_[100:, :])
    assert overlap(cut_out(laid(mask)), mask) > 0.99


@pytest.mark.parametrize(("side", "found"), [(7, False), (8, True)])
def test_a_picture_of_eight_pixels_is_large_enough(side: int, found: bool) -> None:
    mask = box(np.s_[2 : side - 2, 30:70], shape=(side, 100))
    cutout = cut_out(laid(mask))
    assert (cutout is not None) == found


@pytest.mark.parametrize(("noise", "plain"), [(5, True), (7, False)])
def test_a_plain_background_has_little_noise(noise: int, plain: bool) -> None:
    mask = coat()
    light = 200 + np.random.default_rng(1).integers(-noise, noise + 1, mask.shape)
    found = cut_out(laid(mask, light))
    assert overlap(found, mask) > 0.98
    assert found is not None
    assert found.plain == plain


@pytest.mark.parametrize(("contrast", "noise"), [(5, 0), (10, 3)])
def test_a_garment_may_be_hardly_darker_than_the_noise(contrast: int, noise: int) -> None:
    mask = coat()
    gray = 230 - contrast * mask.astype(int)
    gray += np.random.default_rng(0).integers(-noise, noise + 1, mask.shape)
    picture = np.repeat(gray[..., None], 3, axis=2).astype(np.uint8)
    assert overlap(cut_out(picture), mask) > 0.98


def test_uneven_light_around_a_garment_at_the_border_is_background() -> None:
    """Four rounds of the fit leave out the garment; two do not."""
    y, x = np.mgrid[-1:1:160j, -1:1:120j]
    light = (200 - 60 * (x * x + y * y / 2) + 30 * x).astype(int)
    mask = box(np.s_[60:, 30:90])
    assert overlap(cut_out(laid(mask, light)), mask) > 0.99


@pytest.mark.parametrize(("hole", "is_open"), [((60, 48), True), ((80, 60), False)])
def test_what_is_enclosed_is_a_hole_unless_it_is_half_of_the_outline(
    hole: tuple[int, int], is_open: bool
) -> None:
    """The areas are 0.3 and 0.5 of it."""
    top, left = 80 - hole[0] // 2, 60 - hole[1] // 2
    inside = box(np.s_[top : top + hole[0], left : left + hole[1]])
    outline = box(np.s_[20:140, 20:100])
    found = cut_out(laid(outline & ~inside))
    assert overlap(found, outline & ~inside if is_open else outline) == 1


@pytest.mark.parametrize(("width", "is_part"), [(5, True), (2, False)])
def test_a_strap_beside_the_garment_is_a_part_and_a_hair_is_not(width: int, is_part: bool) -> None:
    mask = coat()
    strap = box(np.s_[70:110, 83 : 83 + width])
    assert overlap(cut_out(laid(mask | strap)), mask | strap if is_part else mask) == 1


def test_dust_is_as_large_as_the_picture_is() -> None:
    mask = coat().repeat(3, axis=0).repeat(3, axis=1)
    found = cut_out(laid(mask | box(np.s_[300:306, 75:81], shape=(480, 360))))
    assert found is not None
    assert not found.mask[295:311, 70:86].any()


@pytest.mark.parametrize(("side", "is_part"), [(12, True), (7, False)])
def test_on_a_busy_background_a_part_is_larger(side: int, is_part: bool) -> None:
    mask, piece = coat(), box(np.s_[105 : 105 + side, 22 : 22 + side])
    random = np.random.default_rng(1)
    picture = np.repeat((200 + random.integers(-12, 13, (160, 120)))[..., None], 3, axis=2)
    picture[mask | piece] = [150, 30, 40]
    found = cut_out((picture + random.integers(-3, 4, picture.shape)).astype(np.uint8))
    assert found is not None
    assert not found.plain
    assert (found.mask[piece].mean() > 0.8) == is_part
    assert found.mask[piece].any() == is_part


def test_a_line_behind_the_garment_is_removed_and_a_strap_to_the_border_is_not() -> None:
    """The line is six pixels thick, the strap ten."""
    mask = coat()
    crossed = cut_out(laid(mask, ground((slice(80, 86), ALL), level=60)))
    assert overlap(crossed, mask) == 1
    strapped = mask | box(np.s_[:32, 55:65])
    assert overlap(cut_out(laid(strapped)), strapped) == 1


@pytest.mark.parametrize(("gap", "is_part"), [(5, True), (8, False)])
def test_only_what_is_near_belongs_to_the_garment(gap: int, is_part: bool) -> None:
    mask = box(np.s_[20:110, 40:80])
    thing = box(np.s_[110 + gap : 122 + gap, 50:62])
    assert overlap(cut_out(laid(mask | thing)), mask | thing if is_part else mask) == 1


@pytest.mark.parametrize(("height", "kept"), [(35, False), (45, True)])
def test_a_distant_thing_is_kept_if_it_is_two_fifths_of_the_garment(
    height: int, kept: bool
) -> None:
    """The garment has 3,000 pixels, the thing 30 in each row."""
    mask = box(np.s_[30:90, 20:70], shape=(120, 160))
    thing = box(np.s_[40 : 40 + height, 110:140], shape=(120, 160))
    assert overlap(cut_out(laid(mask | thing)), mask | thing if kept else mask) == 1


@pytest.mark.parametrize(("height", "two"), [(27, False), (33, True)])
def test_a_second_object_has_half_the_area_of_the_first(height: int, two: bool) -> None:
    first = box(np.s_[10:70, 10:60])
    second = box(np.s_[90 : 90 + height, 10:60])
    found = larger_of_two(first | second)
    assert (found is not None) == two
    if found is not None:
        np.testing.assert_array_equal(found, first)


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
