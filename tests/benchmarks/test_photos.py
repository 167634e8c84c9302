"""The benchmark of photographs, on a few test images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from benchmarks import photo_model, photos


class Answers:
    """Stands in for a classifier: it gives these classes to any images."""

    def __init__(self, classes: list[int]) -> None:
        self._classes = classes

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert images.shape == (len(self._classes), 1, 28, 28)
        return np.eye(10, dtype=np.float32)[self._classes]


def test_a_loss_is_the_points_that_the_conversion_costs() -> None:
    """The images themselves: all four right; converted: three."""
    images = np.full((4, 28, 28), 200, np.uint8)
    labels = np.array([1, 2, 3, 4], np.uint8)
    classifiers: Any = Answers([1, 2, 3, 4]), Answers([1, 2, 3, 5])
    row = photos.measure(images, labels, classifiers, "white", "PNG")
    assert (row.ground, row.format, row.accuracy, row.loss) == ("white", "PNG", 0.75, 25)


@pytest.mark.parametrize("smoothly", [False, True])
@pytest.mark.parametrize("ground", photos.GROUNDS)
def test_an_enlarged_image_is_whole_and_negated_on_white_alone(ground: str, smoothly: bool) -> None:
    image = np.zeros((28, 28), np.uint8)
    image[4:20, 6:10] = 180
    for seed in range(5):
        picture = photos.enlarged(image, ground, smoothly, np.random.default_rng(seed))
        gray = np.asarray(picture, int)
        garment = np.abs(gray - (255 if ground == "white" else 0)) > 90
        rows, columns = (np.flatnonzero(garment.any(axis)) for axis in (1, 0))
        assert 10 <= round(len(columns) / 4) <= 25
        assert len(rows) / len(columns) == pytest.approx(4, rel=0.03)
        inside = gray[rows[len(rows) // 2], columns[len(columns) // 2]]
        assert inside == pytest.approx(255 - 180 if ground == "white" else 180, abs=8)


def test_a_missing_data_set_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    for command, arguments in ((photos.main, []), (photo_model.main, [str(tmp_path)])):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"Error: {tmp_path}/t")
        assert ".gz is missing: put the four Fashion-MNIST .gz files there" in line


@pytest.mark.slow
@pytest.mark.usefixtures("fashion_mnist")
def test_photographs_are_measured_in_every_scene() -> None:
    result = CliRunner().invoke(photos.main, ["20"])
    assert result.exit_code == 0, result.output
    *table, line = result.stdout.splitlines()
    rows = json.loads(line)["rows"]
    assert [row["ground"] for row in rows[4:]] == list(photos.SCENES)
    assert len(table) == 2 + len(rows)
    for row in rows:
        assert row["accuracy"] * 20 == pytest.approx(round(row["accuracy"] * 20))
        assert row["accuracy"] > 0.6
        assert row["milliseconds"] > 0
