"""Pictures of a run: the same bytes each time, and PNG under any name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.evaluation import pictures
from training.fitting.run import Run

COMMITTED = Path(__file__).parents[3] / "models" / "run"


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


def test_pictures_are_drawn_the_same_each_time(tmp_path: Path) -> None:
    run = Run(shutil.copytree(COMMITTED, tmp_path / "run"))
    names = ("curves.png", "confusion.png", "norms.png")
    drawn = []
    for _ in range(2):
        pictures.draw_run(run)
        drawn.append([(run.folder / name).read_bytes() for name in names])
    assert drawn[0] == drawn[1]
    assert all(colours(run.folder / name) > 20 for name in names)


@pytest.mark.parametrize("name", ["a.txt", "a.svg", "a"])
def test_a_picture_is_a_png_under_any_name(name: str, tmp_path: Path) -> None:
    pictures.draw_confusion([[1] * 10] * 10, tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == "PNG"
