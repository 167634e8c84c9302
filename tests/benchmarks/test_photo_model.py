"""The fit of the model for converted pictures: small ones, on real images."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks import photo_model
from benchmarks.photo_folder import read_folder
from service.model.classifier import Classifier
from service.settings import MODEL, PICTURE_MODEL
from training.dataset import CLASS_NAMES, FashionMNIST, Split
from training.fitting.run import Run
from training.model import BNLeNet

CARD = MODEL.parent / "PHOTOS_CARD.md"


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    sizes = {"enlarged": 4, "scenes": 2, "native": 3, "photographs": 2}
    counts = {"ENLARGED": 6, "IN_SCENES": 2, "BAGS_IN_SCENES": 1, "COPIES": 1, "STEPS": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**counts, "BATCH": sizes}.items():
            patch.setattr(photo_model, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw trousers and a pair of shoes, for both halves."""
    folder = tmp_path_factory.mktemp("photographs")
    picture = Image.new("RGB", (120, 160), "white")
    ImageDraw.Draw(picture).polygon([(40, 10), (80, 10), (95, 150), (60, 60), (25, 150)], "#305070")
    for number in range(8):
        picture.save(folder / f"1_trousers_{number}.png")
        picture.save(folder / f"9_pair_{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(fashion_mnist: FashionMNIST) -> FashionMNIST:
    """Return the data set with 300 training and 200 test images."""
    train, test = fashion_mnist.train, fashion_mnist.test
    return replace(
        fashion_mnist,
        train=Split(train.images[:300], train.labels[:300]),
        test=Split(test.images[:200], test.labels[:200]),
    )


@pytest.fixture(scope="module")
def made(folder: Path, data: FashionMNIST, small: None) -> dict[str, NDArray[np.integer]]:  # noqa: ARG001 - of these sizes
    return photo_model.make_pictures(folder, data.train)


@pytest.fixture
def start() -> BNLeNet:
    return Run(MODEL.parent / "run").model()


def state(model: BNLeNet) -> torch.Tensor:
    return torch.cat([t.double().ravel() for t in model.state_dict().values()])


def test_the_card_describes_the_committed_file() -> None:
    data, card = PICTURE_MODEL.read_bytes(), CARD.read_text()
    assert f"| SHA-256 | `{hashlib.sha256(data).hexdigest()}` |" in card
    assert f"| size | {len(data):,} bytes |" in card
    entries = {entry.key: entry.value for entry in onnx.load(PICTURE_MODEL).metadata_props}
    assert f"({entries['temperature']})" in card
    assert f"photo_model DIR --seed {entries['seed']}\n" in card
    assert f"| accuracy on the test images themselves | {entries['test_accuracy']} (" in card


def test_only_single_objects_of_the_development_half_are_used(
    folder: Path, made: dict[str, NDArray[np.integer]]
) -> None:
    wanted = [p for p in read_folder(folder, CLASS_NAMES) if p.half == "development" and not p.pair]
    assert 0 < len(wanted) < 8
    assert made["photographs"].shape == (len(wanted), 2, 28, 28)
    assert set(made["labels"]) == {1}


def test_enlarged_images_come_back_as_they_were(
    folder: Path, data: FashionMNIST, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each converted picture is more like its own training image than like the others."""
    monkeypatch.setattr(photo_model, "ENLARGED", 20)
    train = data.train
    made = photo_model.make_pictures(folder, train)
    found = made["enlarged"].reshape(20, -1).astype(float)
    images = train.images[made["enlarged_rows"]].reshape(20, -1).astype(float)
    nearest = ((found[:, None] - images[None]) ** 2).sum(2).argmin(1)
    assert (nearest == np.arange(20)).mean() >= 0.9
    assert (train.labels[made["scenes_rows"]][-1:] == CLASS_NAMES.index("Bag")).all()


def test_the_fit_changes_a_copy_and_mixes_it_with_the_start(
    made: dict[str, NDArray[np.integer]],
    data: FashionMNIST,
    start: BNLeNet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, before = data.train, state(start)
    found = {}
    for share in (0.0, 0.75, 1.0):
        monkeypatch.setattr(photo_model, "SHARE", share)
        found[share] = photo_model.fine_tune(start, made, train, seed=1)
    assert torch.equal(state(start), before)
    assert torch.equal(state(found[0.0]), before)
    assert not torch.equal(state(found[1.0]), before)
    mixed = 0.25 * before + 0.75 * state(found[1.0])
    torch.testing.assert_close(state(found[0.75]), mixed, rtol=0, atol=1e-6)
    for name, values in start.state_dict().items():
        if "running" in name or name.endswith((".mean", ".variance")):
            assert torch.equal(found[1.0].state_dict()[name], values), name


def test_a_seed_decides_the_weights(
    made: dict[str, NDArray[np.integer]], data: FashionMNIST, start: BNLeNet
) -> None:
    one, same, other = (
        state(photo_model.fine_tune(start, made, data.train, seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_step_learns_the_starts_answers_to_images_and_the_labels_of_photographs(
    made: dict[str, NDArray[np.integer]],
    data: FashionMNIST,
    start: BNLeNet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images in the place of augmented ones; the photographs' labels are smoothed."""
    seen, targets = [], []
    cross_entropy = F.cross_entropy

    def images_as_they_are(images: Tensor, _: torch.Generator) -> Tensor:
        seen.append(images)
        return images

    def noted(logits: Tensor, target: Tensor) -> Tensor:
        targets.append(target)
        return cross_entropy(logits, target)

    monkeypatch.setattr(photo_model, "OF_IMAGES", images_as_they_are)
    monkeypatch.setattr(F, "cross_entropy", noted)
    photo_model.fine_tune(start, made, data.train, seed=2)
    for images, target in zip(seen, targets, strict=True):
        answers = start(images).softmax(1)
        same = (answers - target[: len(images)]).abs().amax(1) < 1e-5
        assert same.sum() >= 3  # the three images as they are; the others come out of pictures
        smoothed = torch.full((2, 10), 0.01)
        smoothed[:, 1] = 0.91
        torch.testing.assert_close(target[len(images) :], smoothed)


def test_the_rate_warms_up_and_falls_and_the_fit_is_the_mean_of_its_steps(
    made: dict[str, NDArray[np.integer]],
    data: FashionMNIST,
    start: BNLeNet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    weights: list[Tensor] = []

    class Noted(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch overloads it
            super().step(closure)
            rates.append(self.param_groups[0]["lr"])
            parameters = self.param_groups[0]["params"]
            weights.append(torch.cat([one.detach().double().ravel() for one in parameters]))

    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    monkeypatch.setattr(photo_model, "STEPS", 20)
    monkeypatch.setattr(photo_model, "SHARE", 1.0)
    tuned = photo_model.fine_tune(start, made, data.train, seed=0)
    cosine = 0.5e-3 * (1 + np.cos(np.pi * np.arange(20) / 20))
    assert rates == pytest.approx([cosine[0] / 2, *cosine[1:]])  # a tenth of the steps to warm up
    found = torch.cat([one.double().ravel() for one in tuned.parameters()])
    torch.testing.assert_close(found, torch.stack(weights).mean(0), rtol=0, atol=1e-5)


def test_rare_classes_are_drawn_more_often(
    made: dict[str, NDArray[np.integer]],
    data: FashionMNIST,
    start: BNLeNet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A class with a quarter of another's photographs: each of them twice as often."""
    drawn_by: list[list[float]] = []
    multinomial = torch.multinomial

    def noted(shares: Tensor, *arguments: Any, **options: Any) -> Tensor:
        drawn_by.append((shares / shares[-1]).tolist())
        return multinomial(shares, *arguments, **options)

    monkeypatch.setattr(torch, "multinomial", noted)
    pictures = {"photographs": made["photographs"][[0] * 5], "labels": np.array([1, 1, 1, 1, 9])}
    photo_model.fine_tune(start, made | pictures, data.train, seed=0)
    assert drawn_by[0] == pytest.approx([0.5, 0.5, 0.5, 0.5, 1])


@pytest.mark.parametrize(("labels", "added"), [([1, 9], 2), ([1, 8], 0)])
def test_bags_in_scenes_stand_in_only_if_no_photograph_shows_a_bag(
    labels: list[int], added: int
) -> None:
    """Of five, two pairs: a photograph has two versions here."""
    scenes = np.arange(7 * 784).reshape(7, 28, 28)
    photographs = np.zeros((2, 2, 28, 28), np.int64)
    found = photo_model.with_bags(
        {"scenes": scenes, "photographs": photographs, "labels": np.array(labels)}
    )
    assert found["labels"].tolist() == [*labels, *[8] * added]
    assert found["photographs"].shape == (2 + added, 2, 28, 28)
    assert np.array_equal(found["photographs"][2:].reshape(-1, 28, 28), scenes[2 : 2 + 2 * added])


def test_the_command_exports_the_network_with_the_committed_temperature(
    folder: Path, data: FashionMNIST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that changes nothing gives the committed model's answers."""
    monkeypatch.setattr(photo_model, "load", lambda: data)
    monkeypatch.setattr(photo_model, "SHARE", 0.0)
    out = tmp_path / "photos.onnx"
    done = CliRunner().invoke(photo_model.main, [str(folder), "--out", str(out), "--seed", "3"])
    assert done.exit_code == 0, done.output
    entries = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert entries["recipe"] == "best, then fitted to converted pictures"
    assert entries["seed"] == "3"
    images = data.test.images[:, None].copy()
    before, after = (Classifier.load(path).probabilities(images) for path in (MODEL, out))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)
