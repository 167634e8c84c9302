"""Random changes: their limits, measured on dots, blobs and greys, and what they do not change."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from training.dataset import FashionMNIST
from training.fitting.augmentation import Augmentation, gaussian_blur
from training.fitting.recipes import RECIPES


@pytest.fixture(scope="module")
def images(fashion_mnist: FashionMNIST) -> Tensor:
    return torch.from_numpy(fashion_mnist.train.images[:400])[:, None] / 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(x: float, y: float, count: int) -> Tensor:
    """Make copies of an image with one round spot, at this offset right of and below the centre."""
    down, right = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    spot = torch.exp(-((right - 13.5 - x) ** 2 + (down - 13.5 - y) ** 2) / 4)
    return spot.expand(count, 1, 28, 28)


def spots(view: Tensor) -> Tensor:
    """Return the offset of every image's spot, right of and below the centre: [n, 2]."""
    place = torch.arange(28.0) - 13.5
    mass = view.sum((1, 2, 3))
    return torch.stack([(view[:, 0].sum(axis) * place).sum(1) / mass for axis in (1, 2)], 1)


def test_no_augmentation_changes_nothing_and_draws_nothing(images: Tensor) -> None:
    generator = seeded()
    state = generator.get_state()
    assert torch.equal(Augmentation()(images, generator), images)
    assert torch.equal(generator.get_state(), state)


def test_the_same_generator_gives_the_same_images_with_any_number_of_threads(
    images: Tensor,
) -> None:
    views = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        views.append(RECIPES["best"].augmentation(images, seeded()))
    torch.testing.assert_close(views[0], views[1], rtol=0, atol=1e-6)
    assert not torch.equal(views[0], RECIPES["best"].augmentation(images, seeded(1)))


def test_the_input_does_not_change_and_the_range_is_kept(images: Tensor) -> None:
    before = images.clone()
    view = RECIPES["best"].augmentation(images, seeded())
    assert torch.equal(images, before)
    assert view.shape == images.shape
    assert view.min() >= 0
    assert view.max() <= 1


def test_flips_mirror_half_of_the_images(images: Tensor) -> None:
    view = Augmentation(flip=True)(images, seeded())
    mirrored = (view == images.flip(3)).all((1, 2, 3))
    same = (view == images).all((1, 2, 3))
    assert (mirrored | same).all()
    assert 0.4 < mirrored.float().mean() < 0.6


def test_whole_pixel_shifts_reach_every_place_equally_often() -> None:
    dot = torch.zeros(5000, 1, 28, 28)
    dot[:, :, 14, 14] = 1
    view = Augmentation(shift=2)(dot, seeded())
    places = view.sum((0, 1))
    assert places.sum() == 5000
    square = places[12:17, 12:17]
    assert square.sum() == 5000
    assert square.min() > 140  # of 200 expected, standard deviation 14
    assert square.max() < 260


def test_rotation_and_scale_are_those_of_a_turned_and_scaled_dot() -> None:
    """A blob 8 pixels right of the centre goes to the circle's points within the limits."""
    right, down = spots(Augmentation(rotation=12, scale=0.1)(blob(8, 0, 500), seeded())).T
    angle = torch.rad2deg(torch.atan2(down, right))
    radius = torch.hypot(down, right) / 8
    assert 11 < angle.abs().max() < 12.1
    assert angle.mean().abs() < 1
    assert 0.89 < radius.min() < 0.92
    assert 1.08 < radius.max() < 1.12


def test_turned_images_are_mirrored_and_shifted_too() -> None:
    """All in one resampling, with nearly no rotation: a blob 6 pixels right of the centre."""
    change = Augmentation(flip=True, shift=2, rotation=1e-6)
    right, down = spots(change(blob(6, 0, 1000), seeded())).T
    assert 0.45 < (right < 0).float().mean() < 0.55
    for moved in (right.abs() - 6, down):
        assert 1.9 < moved.max() < 2.05
        assert -2.05 < moved.min() < -1.9


def test_turned_images_move_by_as_many_pixels_as_were_drawn_and_edges_are_black() -> None:
    """Bilinear, in numpy: a weighted mean of the four pixels around each source."""
    images = torch.rand(20, 1, 28, 28, generator=seeded(1))
    view = Augmentation(shift=6, rotation=1e-9)(images, seeded())
    generator = seeded()
    draws = [2 * torch.rand(20, generator=generator) - 1 for _ in range(5)]
    right, down = 6 * draws[3], 6 * draws[4]  # after the mirror, the angle and the size
    padded = np.pad(images[:, 0].numpy(), ((0, 0), (8, 8), (8, 8)))
    for k in range(20):
        y, x = 8 + float(down[k]), 8 + float(right[k])
        top, left = math.floor(y), math.floor(x)
        expected = np.zeros((28, 28))
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            share = abs(1 - row - (y - top)) * abs(1 - column - (x - left))
            rows, columns = (
                slice(top + row, top + row + 28),
                slice(left + column, left + column + 28),
            )
            expected += share * padded[k, rows, columns]
        np.testing.assert_allclose(view[k, 0].numpy(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("flip", [True, False])
def test_turned_images_keep_their_shape(flip: bool) -> None:
    """Where the ends of two perpendicular arms go shows the map: a similarity, mirrored or not."""
    change = Augmentation(flip=flip, rotation=20, scale=0.25)
    arms = [spots(change(blob(*end, 500), seeded())) for end in ((6, 0), (0, 6))]
    maps = torch.stack(arms, 2) / 6
    sizes = torch.linalg.det(maps).abs().sqrt()
    square = maps.mT @ maps
    torch.testing.assert_close(square, sizes.view(-1, 1, 1) ** 2 * torch.eye(2), rtol=0, atol=0.02)
    assert -0.26 < sizes.log().min() < -0.24
    assert 0.24 < sizes.log().max() < 0.26
    mirrored = (torch.linalg.det(maps) < 0).float().mean()
    assert 0.4 < mirrored < 0.6 if flip else mirrored == 0
    assert maps[:, 1, 1].min() > 0  # upright: the mirror is left and right


def test_contrast_is_about_each_images_own_mean() -> None:
    """So a picture of one grey stays as it is, also among brighter ones."""
    greys = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1, 1).expand(3, 1, 28, 28)
    torch.testing.assert_close(Augmentation(contrast=0.9)(greys, seeded()), greys)


@pytest.mark.parametrize(
    "change",
    [
        Augmentation(contrast=0.9),
        Augmentation(brightness=0.9),
        Augmentation(sharpness=1.0, sharpness_share=1.0),
        Augmentation(contrast=0.9, gamma=0.5),
    ],
)
def test_pixels_never_leave_the_range(change: Augmentation) -> None:
    """The images have the extreme values already, so changes must be clipped."""
    generator = seeded(3)
    images = (torch.rand(64, 1, 28, 28, generator=generator) > 0.3).float()
    view = change(images, generator)
    assert view.min() >= 0
    assert view.max() == 1


def test_every_image_draws_its_own_amounts(images: Tensor) -> None:
    same = images[:1].expand(20, 1, 28, 28)
    for change in (
        Augmentation(shift=9, flip=True),
        Augmentation(rotation=10),
        Augmentation(scale=0.1),
        Augmentation(sharpness=1.0, sharpness_share=1.0),
        Augmentation(contrast=0.3),
        Augmentation(brightness=0.3),
        Augmentation(gamma=0.3),
    ):
        assert len({tuple(image.flatten().tolist()) for image in change(same, seeded())}) > 15


@pytest.mark.parametrize("kind", ["brightness", "contrast", "gamma", "sharpness"])
def test_an_amount_is_the_next_number_of_the_generator(kind: str) -> None:
    """So a seed gives the same images again; a change with limit zero draws nothing."""
    images = torch.rand(16, 1, 28, 28, generator=seeded(1))
    amounts = 0.8 * (2 * torch.rand(16, 1, 1, 1, generator=seeded()) - 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    expected = {
        "brightness": images * (1 + amounts),
        "contrast": mean + (1 + amounts) * (images - mean),
        "gamma": images ** amounts.exp(),
        "sharpness": images + amounts * (gaussian_blur(images, 1.0) - images),
    }[kind].clamp(0, 1)
    changes = {
        "brightness": Augmentation(brightness=0.8),
        "contrast": Augmentation(contrast=0.8),
        "gamma": Augmentation(gamma=0.8),
        "sharpness": Augmentation(sharpness=0.8, sharpness_share=1.0),
    }
    generator = seeded()
    torch.testing.assert_close(changes[kind](images, generator), expected, rtol=0, atol=1e-5)
    torch.rand(16, generator=(other := seeded()))
    assert torch.equal(generator.get_state(), other.get_state())


def test_a_quarter_draws_a_sharpness_by_default(images: Tensor) -> None:
    given = Augmentation(sharpness=1.0, sharpness_share=0.25)(images, seeded())
    assert torch.equal(Augmentation(sharpness=1.0)(images, seeded()), given)


def test_brightness_contrast_and_gamma_follow_their_formulas() -> None:
    grey = torch.full((1000, 1, 28, 28), 0.5)
    grey[:, :, :14] = 0.25
    ratio = Augmentation(brightness=0.3)(grey, seeded())[:, 0, 0, 0] / 0.25
    assert 0.7 <= ratio.min() < 0.72
    assert 1.28 < ratio.max() <= 1.3
    flat = Augmentation(contrast=0.35)(grey, seeded())
    torch.testing.assert_close(flat.mean((1, 2, 3)), grey.mean((1, 2, 3)))
    spread = (flat[:, 0, 27, 0] - flat[:, 0, 0, 0]) / 0.25
    assert 0.65 <= spread.min() < 0.67
    assert 1.33 < spread.max() <= 1.35
    exponent = Augmentation(gamma=0.35)(grey, seeded())[:, 0, 27, 0].log() / math.log(0.5)
    assert exponent.log().abs().max() <= 0.3501
    assert exponent.log().abs().max() > 0.34


def test_sharpness_blurs_some_and_sharpens_others_of_its_share(images: Tensor) -> None:
    view = Augmentation(sharpness=1.0, sharpness_share=0.25)(images, seeded())
    assert torch.equal(view[100:], images[100:])
    assert view.min() >= 0
    assert view.max() <= 1
    detail = [(x[:100].diff(dim=3) ** 2).sum((1, 2, 3)) for x in (view, images)]
    sharper = (detail[0] > detail[1]).float().mean()
    assert 0.3 < sharper < 0.7


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_a_blur_is_a_weighted_mean_of_neighbours_with_the_edge_repeated(sigma: float) -> None:
    """Pixel by pixel in numpy, over all neighbours within three sigma in both directions."""
    generator = np.random.default_rng(0)
    image = generator.random((9, 12))
    reach = math.ceil(3 * sigma)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    expected = np.empty_like(image)
    for row, column in np.ndindex(image.shape):
        rows = np.clip(row + offsets, 0, 8)
        columns = np.clip(column + offsets, 0, 11)
        expected[row, column] = np.average(image[np.ix_(rows, columns)], weights=weights)
    found = gaussian_blur(torch.from_numpy(image)[None, None], sigma)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=0, atol=1e-12)


def test_a_blur_of_a_dot_is_the_gaussian() -> None:
    dot = torch.zeros(1, 1, 15, 15)
    dot[:, :, 7, 7] = 1
    blurred = gaussian_blur(dot, 1.0)
    assert blurred.sum() == pytest.approx(1, abs=1e-6)
    assert blurred[0, 0, 7, 8] / blurred[0, 0, 7, 7] == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert blurred[0, 0, 9, 8] / blurred[0, 0, 7, 7] == pytest.approx(math.exp(-2.5), rel=1e-5)
