"""Pictures of a run: the same bytes each time, and PNG under any name."""

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from tests.training.evaluation.conftest import rows
from training.batch_norm import affine, statistics
from training.dataset import CLASS_NAMES
from training.evaluation import pictures
from training.fitting.run import Epoch, Run
from training.model import norm_layers

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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the figures that are drawn, in place of files."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, _: drawn.append(figure))
    return drawn


OUT = Path("unused")


def test_the_curves_are_the_metrics_by_epoch(figures: list[Figure]) -> None:
    lines = [Epoch(i, 1 / i, 0.5 + i / 100, 0.4 + i / 100, 0.1, 1.0, 1.0) for i in (1, 2, 3)]
    pictures.draw_curves(lines, OUT)
    left, right = figures[0].axes
    (loss,) = left.lines
    assert np.array_equal(loss.get_xydata(), [(1, 1), (2, 1 / 2), (3, 1 / 3)])
    curves = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in right.lines}
    assert curves.keys() == {"training", "evaluation"}
    assert curves["training"] == pytest.approx([0.51, 0.52, 0.53])
    assert curves["evaluation"] == pytest.approx([0.41, 0.42, 0.43])
    assert right.get_legend() is not None
    assert [axes.get_xlabel() for axes in (left, right)] == ["epoch", "epoch"]


def test_a_confusion_matrix_has_true_classes_as_rows_and_shares_as_shades(
    figures: list[Figure],
) -> None:
    counts = np.zeros((10, 10), int)
    counts[2, 5], counts[2, 2] = 30, 10
    pictures.draw_confusion(counts.tolist(), OUT)
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("answer", "true class")
    (shades,) = axes.images
    expected = np.zeros((10, 10))
    expected[2, 5], expected[2, 2] = 0.75, 0.25
    assert np.array_equal(np.asarray(shades.get_array()), expected)
    assert shades.get_clim() == (0, 1)
    texts = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert texts[5, 2] == ("30", "white")  # at x, y: readable on a dark shade
    assert texts[2, 2] == ("10", "black")
    assert texts[2, 5] == ("0", "black")
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == list(CLASS_NAMES)


def test_a_layers_panel_has_beta_to_the_right_and_gamma_up(figures: list[Figure]) -> None:
    model = Run(COMMITTED).model()
    pictures.draw_norms(model, OUT)
    for axes, (name, layer) in zip(figures[0].axes, norm_layers(model).items(), strict=True):
        gamma, beta = (tensor.tolist() for tensor in affine(layer))
        (points,) = axes.collections
        assert np.asarray(points.get_offsets()).tolist() == [
            list(pair) for pair in zip(beta, gamma, strict=True)
        ]
        assert axes.get_title() == f"{name}, {len(gamma)} channels"
        assert axes.get_xlabel() == "beta (shift)"
    assert figures[0].axes[0].get_ylabel() == "gamma (scale)"
    found = pictures.affine_parameters(model)
    assert found.keys() == norm_layers(model).keys()
    assert found["norm1"] == tuple(tensor.tolist() for tensor in affine(model.norm1))


def test_a_unit_is_drawn_before_and_after_its_norm_in_training_and_prediction(
    figures: list[Figure],
) -> None:
    """The expected values come from the layers one by one, in float64."""
    model = Run(COMMITTED).model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8)
    pictures.draw_unit(model, images, OUT)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert not model.training

    x = torch.from_numpy(images)[:, None].double() / 255
    double = copy.deepcopy(model).double()
    for name, layer in double.named_children():
        if name == "norm3":
            break
        x = layer(x)
    unit = x[:, 0].numpy()
    gamma, beta = (float(tensor[0]) for tensor in affine(model.norm3))
    mean, variance = (float(tensor[0]) for tensor in statistics(model.norm3))
    batch = unit[:128]
    expected = [
        unit,
        gamma * (batch - batch.mean()) / np.sqrt(batch.var() + 1e-5) + beta,
        gamma * (unit - mean) / np.sqrt(variance + 1e-5) + beta,
    ]
    kinds = ["before the layer", "in training", "in prediction"]
    for axes, values, kind in zip(figures[0].axes, expected, kinds, strict=True):
        assert kind in axes.get_title()
        found = re.findall(r"-?\d+\.\d\d", axes.get_xlabel())
        assert [*map(float, found)] == pytest.approx([values.mean(), values.std()], abs=0.006)
        edges = [bar.get_x() for bar in axes.patches if isinstance(bar, Rectangle)]
        assert len(edges) == 40
        assert min(edges) == pytest.approx(values.min(), abs=1e-3)


def test_confident_answers_are_a_curve_with_a_dot_for_each_threshold(figures: list[Figure]) -> None:
    """Worked out by hand: of four answers, the second most confident is wrong."""
    probabilities = rows((0, 0.91), (1, 0.81), (2, 0.55), (3, 0.31))
    pictures.draw_confidence(probabilities, np.array([0, 9, 2, 3], np.uint8), OUT)
    (axes,) = figures[0].axes
    curve, *dots = (np.asarray(line.get_xydata()).tolist() for line in axes.lines)
    assert curve == pytest.approx(np.array([(0.25, 1), (0.5, 0.5), (0.75, 2 / 3), (1, 0.75)]))
    expected = {"0.5": (0.75, 2 / 3), **dict.fromkeys(("0.6", "0.7", "0.8"), (0.5, 0.5))}
    expected["0.9"] = (0.25, 1)  # no answer is more confident
    assert [tuple(dot) for (dot,) in dots] == [pytest.approx(place) for place in expected.values()]
    assert [text.get_text() for text in axes.texts] == [*expected]
    assert axes.get_xlabel() == "share of images answered"
    assert axes.get_ylabel() == "accuracy of the answers"


@pytest.mark.parametrize("name", ["a.txt", "a.svg", "a"])
def test_a_picture_is_a_png_under_any_name(name: str, tmp_path: Path) -> None:
    pictures.draw_confusion([[1] * 10] * 10, tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == "PNG"
