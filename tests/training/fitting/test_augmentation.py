import math

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


def test_the_input_is_left_alone_and_the_range_is_kept(images: Tensor) -> None:
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
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    blob = torch.exp(-((x - 21.5) ** 2 + (y - 13.5) ** 2) / 4).expand(500, 1, 28, 28)
    view = Augmentation(rotation=12, scale=0.1)(blob, seeded())
    mass = view.sum((1, 2, 3))
    right, down = (
        (view[:, 0] * x).sum((1, 2)) / mass - 13.5,
        (view[:, 0] * y).sum((1, 2)) / mass - 13.5,
    )
    angle = torch.rad2deg(torch.atan2(down, right))
    radius = torch.hypot(down, right) / 8
    assert 11 < angle.abs().max() < 12.1
    assert angle.mean().abs() < 1
    assert 0.89 < radius.min() < 0.92
    assert 1.08 < radius.max() < 1.12


def test_turned_images_are_mirrored_and_shifted_too() -> None:
    """All in one resampling, with next to no turn: a blob 6 pixels right of the centre."""
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    blob = torch.exp(-((x - 19.5) ** 2 + (y - 13.5) ** 2) / 4).expand(1000, 1, 28, 28)
    view = Augmentation(flip=True, shift=2, rotation=1e-6)(blob, seeded())[:, 0]
    mass = view.sum((1, 2))
    right, down = ((view * place).sum((1, 2)) / mass - 13.5 for place in (x, y))
    assert 0.45 < (right < 0).float().mean() < 0.55
    for moved in (right.abs() - 6, down):
        assert 1.9 < moved.max() < 2.05
        assert -2.05 < moved.min() < -1.9


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


def test_a_blur_of_a_dot_is_the_gaussian() -> None:
    dot = torch.zeros(1, 1, 15, 15)
    dot[:, :, 7, 7] = 1
    blurred = gaussian_blur(dot, 1.0)
    assert blurred.sum() == pytest.approx(1, abs=1e-6)
    assert blurred[0, 0, 7, 8] / blurred[0, 0, 7, 7] == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert blurred[0, 0, 9, 8] / blurred[0, 0, 7, 7] == pytest.approx(math.exp(-2.5), rel=1e-5)
