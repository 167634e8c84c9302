import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from numpy.typing import NDArray
from PIL import Image

from training.dataset import FashionMNIST
from training.evaluation.robustness import UNSEEN, perturbations, perturbed, resample
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


def test_one_change_of_each_pair_of_opposites_is_unseen() -> None:
    pairs = [
        ("shift (-2, -2)", "shift (+2, +2)"),
        ("shift (-2, +0)", "shift (+2, +0)"),
        ("shift (-2, +2)", "shift (+2, -2)"),
        ("shift (+0, -2)", "shift (+0, +2)"),
        ("rotation +10", "rotation -10"),
        ("blur 0.7", "unsharp 100 %"),
        ("gamma 0.7", "gamma 1.4"),
        ("contrast 0.6", "scale 0.9"),
    ]
    assert {name for pair in pairs for name in pair} == set(perturbations())
    assert len(UNSEEN) == 8
    assert [len({*pair} & {*UNSEEN}) for pair in pairs] == [1] * 8


def test_no_image_of_a_large_set_is_lost(fashion_mnist: FashionMNIST) -> None:
    many = fashion_mnist.test.images[:1100]
    change = perturbations()["contrast 0.6"]
    halves = [change(many[:550]), change(many[550:])]
    assert np.array_equal(change(many), np.concatenate(halves))


@pytest.mark.parametrize(("down", "right"), [(-2, -2), (-2, 0), (-2, 2), (0, -2)])
@pytest.mark.parametrize("sign", [1, -1])
def test_shifts_move_the_content_and_bring_in_background(
    images: NDArray[np.uint8], down: int, right: int, sign: int
) -> None:
    """Every pixel moves by its shift; the others are zero."""
    down, right = sign * down, sign * right
    moved = perturbations()[f"shift ({down:+d}, {right:+d})"](images)
    expected = np.zeros_like(images)
    for y, x in np.ndindex(28, 28):
        if 0 <= y + down < 28 and 0 <= x + right < 28:
            expected[:, y + down, x + right] = images[:, y, x]
    assert np.array_equal(moved, expected)


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
    smaller = resample(images.astype(float), 0.0, 0.9)
    assert np.array_equal(perturbations()["scale 0.9"](images), np.rint(smaller))


def test_blur_and_unsharp_mask_are_those_of_the_gaussian(images: NDArray[np.uint8]) -> None:
    x = torch.from_numpy(images.astype(float))[:, None]
    soft = gaussian_blur(x, 0.7).round()[:, 0].numpy()
    sharp = (2 * x - gaussian_blur(x, 2.0)).round().clamp(0, 255)[:, 0].numpy()
    assert np.array_equal(perturbations()["blur 0.7"](images), soft)
    assert np.array_equal(perturbations()["unsharp 100 %"](images), sharp)


def test_resampling_alone_changes_nothing(images: NDArray[np.uint8]) -> None:
    np.testing.assert_allclose(resample(images.astype(float)), images, rtol=0, atol=1e-9)


def test_tones_follow_their_formulas() -> None:
    greys = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    changes = perturbations()
    for exponent in (0.7, 1.4):
        found = changes[f"gamma {exponent}"](greys).ravel().tolist()
        assert found == [round(255 * (grey / 255) ** exponent) for grey in range(256)]
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, :14] = 100
    flat = changes["contrast 0.6"](image)
    assert (flat[0, 0, 0], flat[0, 27, 0]) == (50 + 0.6 * 50, 50 - 0.6 * 50)


def test_contrast_is_about_each_images_own_mean() -> None:
    greys = np.repeat(np.array([20, 120, 220], np.uint8), 784).reshape(3, 28, 28)
    assert np.array_equal(perturbations()["contrast 0.6"](greys), greys)
