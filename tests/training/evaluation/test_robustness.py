import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from numpy.typing import NDArray
from PIL import Image

from training.dataset import FashionMNIST
from training.evaluation.robustness import perturbations, perturbed, resample
from training.fitting.augmentation import gaussian_blur


@pytest.fixture(scope="module")
def images(fashion_mnist: FashionMNIST) -> NDArray[np.uint8]:
    return fashion_mnist.test.images[:50]


def test_the_set_is_the_sixteen_changes_of_its_definition(images: NDArray[np.uint8]) -> None:
    changed = dict(perturbed(images))
    assert len(changed) == 16
    assert sum(name.startswith("shift") for name in changed) == 8
    for name, result in changed.items():
        assert result.shape == images.shape, name
        assert result.dtype == np.uint8, name
        assert not np.array_equal(result, images), name


def test_no_image_is_lost_where_there_are_many(fashion_mnist: FashionMNIST) -> None:
    many = fashion_mnist.test.images[:1100]
    change = perturbations()["contrast 0.6"]
    halves = [change(many[:550]), change(many[550:])]
    assert np.array_equal(change(many), np.concatenate(halves))


def test_shifts_move_the_content_and_bring_in_background(images: NDArray[np.uint8]) -> None:
    down_left = perturbations()["shift (+2, -2)"](images)
    assert np.array_equal(down_left[:, 2:, :-2], images[:, :-2, 2:])
    assert not down_left[:, :2].any()
    assert not down_left[:, :, -2:].any()
    up = perturbations()["shift (-2, +0)"](images)
    assert np.array_equal(up[:, :-2], images[:, 2:])


@pytest.mark.parametrize(("name", "degrees"), [("rotation +10", 10), ("rotation -10", -10)])
def test_rotations_are_pillows_away_from_the_edge(
    images: NDArray[np.uint8], name: str, degrees: int
) -> None:
    """Pillow computes in fixed point and rounds down; beyond the edge it has no background."""
    for image, ours in zip(images, perturbations()[name](images), strict=True):
        theirs = Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR)
        difference = np.asarray(theirs).astype(int) - ours
        assert np.abs(difference[4:-4, 4:-4]).max() <= 2


@pytest.mark.parametrize(("degrees", "scale"), [(10.0, 1.0), (-10.0, 1.0), (0.0, 0.9), (33.0, 0.5)])
def test_resampling_is_torchs_grid_sample(
    images: NDArray[np.uint8], degrees: float, scale: float
) -> None:
    angle = np.radians(degrees)
    matrix = torch.tensor(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]
    ).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix / scale, [len(images), 1, 28, 28], align_corners=False)
    floats = images.astype(float)
    theirs = F.grid_sample(torch.from_numpy(floats)[:, None], grid, align_corners=False)
    np.testing.assert_allclose(resample(floats, degrees, scale), theirs[:, 0].numpy(), atol=1e-9)


def test_the_scale_is_nine_tenths(images: NDArray[np.uint8]) -> None:
    smaller = resample(images.astype(float), scale=0.9)
    assert np.array_equal(perturbations()["scale 0.9"](images), np.rint(smaller))


def test_blur_and_unsharp_mask_are_those_of_the_gaussian(images: NDArray[np.uint8]) -> None:
    x = torch.from_numpy(images.astype(float))[:, None]
    soft = gaussian_blur(x, 0.7).round()[:, 0].numpy()
    sharp = (2 * x - gaussian_blur(x, 2.0)).round().clamp(0, 255)[:, 0].numpy()
    assert np.array_equal(perturbations()["blur 0.7"](images), soft)
    assert np.array_equal(perturbations()["unsharp 100 %"](images), sharp)


def test_tones_follow_their_formulas() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, :14] = 100
    changes = perturbations()
    assert changes["gamma 0.7"](image)[0, 0, 0] == round(255 * (100 / 255) ** 0.7) == 132
    assert changes["gamma 1.4"](image)[0, 0, 0] == round(255 * (100 / 255) ** 1.4) == 69
    flat = changes["contrast 0.6"](image)
    assert (flat[0, 0, 0], flat[0, 27, 0]) == (50 + 0.6 * 50, 50 - 0.6 * 50)
