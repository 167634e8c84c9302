"""The fit of the model for converted pictures: small ones, on real images."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image, ImageDraw

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
