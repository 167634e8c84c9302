"""docs/batch-norm.md is true: its examples, quoted tables, pictures and list of tests."""

import doctest
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from PIL import Image

from training.dataset import FashionMNIST
from training.evaluation import pictures
from training.fitting.images import on_device
from training.fitting.run import Run
from training.model import BNLeNet, initialise
from training.studies import batch_size
from training.studies.records import Records

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "batch-norm.md").read_text()
RUN = Run(ROOT / "models" / "run")


def rows(text: str) -> list[str]:
    """Return the rows of Markdown tables that hold figures such as 0.9216."""
    return re.findall(r"^\|.*\d\.\d{3}.*\|$", text, re.MULTILINE)


def test_the_examples_print_what_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = re.sub(r"^```.*$", "", PAGE, flags=re.MULTILINE)  # a fence would pass for output
    examples = doctest.DocTestParser().get_doctest(code, {}, "batch-norm.md", None, 0)
    assert len(examples.examples) > 30
    wrong: list[str] = []
    assert doctest.DocTestRunner().run(examples, out=wrong.append).failed == 0, "".join(wrong)


def test_every_row_of_figures_is_quoted_from_a_generated_page() -> None:
    pages = [*DOCS.glob("studies/*.md"), ROOT / "models" / "MODEL_CARD.md"]
    generated = {row for page in pages for row in rows(page.read_text())}
    quoted = rows(PAGE)
    assert len(quoted) > 8
    assert [row for row in quoted if row not in generated] == []


def test_what_was_decided_on_held_out_images_is_as_the_card_says() -> None:
    phrase = re.compile(r"moving \d\.\d+, population \d\.\d+, clean \d\.\d+")
    card = " ".join((ROOT / "models" / "MODEL_CARD.md").read_text().split())
    (quoted,) = phrase.findall(" ".join(PAGE.split()))
    assert quoted in card


def test_every_test_it_names_exists() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE)
    assert len(named) > 20
    assert [
        f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()
    ] == []


def test_its_pictures_are_small() -> None:
    pictures = [DOCS / name for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)]
    assert len(pictures) == 3
    assert [picture for picture in pictures if picture.stat().st_size > 80_000] == []


def test_the_picture_of_gamma_and_beta_is_of_the_committed_model(tmp_path: Path) -> None:
    """Compared by eye, as it were: another version of matplotlib may set its type otherwise."""
    pictures.draw_norms(RUN.model(), tmp_path / "again.png")
    again, committed = (
        np.asarray(Image.open(path).convert("L"), float)
        for path in (tmp_path / "again.png", DOCS / "norms.png")
    )
    assert again.shape == committed.shape
    assert (np.abs(again - committed) > 64).mean() < 0.002


def test_the_batch_size_study_is_of_the_committed_model(fashion_mnist: FashionMNIST) -> None:
    records = Records(DOCS / "studies" / "batch-size.jsonl")
    checkpoint = (RUN.folder / "checkpoint.safetensors").read_bytes()
    assert records.conditions["checkpoint"] == hashlib.sha256(checkpoint).hexdigest()
    recorded = {(line["company"], line["size"]): line["accuracy"][0] for line in records.lines}
    model = RUN.model(RUN.config().recipe.statistics)
    images, labels = on_device(fashion_mnist.test, "cpu")
    for company, size in (("any", 8), ("same", 128)):
        parts = batch_size.batches(labels, size, company, seed=0)
        right = batch_size.answers(model, images, parts) == labels
        assert right.double().mean().item() == pytest.approx(recorded[company, size], abs=1e-3)


def test_the_bias_before_a_batch_norm_is_idle() -> None:
    model = BNLeNet().double()
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 1, 28, 28, dtype=torch.float64, generator=generator)
    torch.autograd.backward([F.cross_entropy(model(x), torch.arange(8))])
    idle = ("conv1.bias", "conv2.bias", "linear1.bias", "linear2.bias")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.abs().max().item() < 1e-12) == (name in idle), name
    assert sum(model.get_parameter(name).numel() for name in idle) == 226
