"""docs/batch-norm.md is true: its examples, quoted tables, pictures and list of tests."""

import doctest
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import nn

from tests.conftest import assert_same_picture
from training import export
from training.batch_norm import affine
from training.dataset import FashionMNIST, Split
from training.evaluation import pictures
from training.fitting.run import Run
from training.folding import fold_batch_norm
from training.model import BNLeNet, initialise, norm_layers
from training.studies import prediction_batch
from training.studies.fits import samples
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
    quoted = [row for row in rows(PAGE) if not row.startswith("| `norm")]  # these: below
    assert len(quoted) > 8
    assert [row for row in quoted if row not in generated] == []
    text = "".join(page.read_text() for page in pages)
    intervals = re.findall(r"\d\.\d+ ± \d\.\d+", PAGE)
    assert [interval for interval in intervals if interval not in text] == []


def test_the_spread_of_batch_statistics_is_as_the_page_says(fashion_mnist: FashionMNIST) -> None:
    model = RUN.model(RUN.config().recipe.statistics)
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in norm_layers(model).items():
        layer.register_forward_pre_hook(
            lambda _, x, name=name: inputs.update({name: x[0].transpose(0, 1).double()})
        )
    with torch.no_grad():
        model(torch.from_numpy(fashion_mnist.train.images[: 40 * 128])[:, None].float() / 255)
    for name, x in inputs.items():
        batches = x.reshape(len(x), 40, -1)  # channel, batch, value
        deviation = x.flatten(1).std(1)
        mean = (batches.mean(2).std(1) / deviation).mean().item()
        variance = (batches.var(2, correction=0).std(1) / deviation**2).mean().item()
        alone = batches.shape[2] ** -0.5
        assert f"| `{name}` | {mean:.3f} | {variance:.2f} | {alone:.3f} |" in PAGE


def test_the_held_out_accuracies_are_the_cards() -> None:
    phrase = re.compile(r"moving \d\.\d+, population \d\.\d+, clean \d\.\d+")
    card = " ".join((ROOT / "models" / "MODEL_CARD.md").read_text().split())
    (quoted,) = phrase.findall(" ".join(PAGE.split()))
    assert quoted in card


def test_every_test_that_it_names_exists() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE)
    assert len(named) > 20
    assert [
        f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()
    ] == []


def test_its_pictures_are_small() -> None:
    pictures = [DOCS / name for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)]
    assert len(pictures) == 4
    assert [picture for picture in pictures if picture.stat().st_size > 80_000] == []


def test_the_pictures_of_the_model_are_of_the_committed_model(
    tmp_path: Path, fashion_mnist: FashionMNIST
) -> None:
    pictures.draw_norms(RUN.model(), tmp_path / "norms.png")
    pictures.draw_unit(RUN.model(), fashion_mnist.test.images, tmp_path / "unit.png")
    for name in ("norms.png", "unit.png"):
        assert_same_picture(tmp_path / name, DOCS / name, share=0.002)


def test_the_study_of_batches_is_of_the_committed_model(fashion_mnist: FashionMNIST) -> None:
    """One random order is measured again, with two batch sizes."""
    records = Records(DOCS / "studies" / "prediction-batch.jsonl")
    sample = samples(fashion_mnist, 20_000).test
    model = RUN.model(RUN.config().recipe.statistics)
    for among, size in (("any", 8), ("same", 128)):
        (line,) = (
            line
            for line in records.lines
            if (line["model"], line["among"], line["seed"]) == ("committed", among, 0)
        )
        recorded = line["accuracy"][line["sizes"].index(size)]
        batches = prediction_batch.draw_batches(sample.labels, size, among, seed=0)
        right = prediction_batch.answers(model, sample.pixels, batches) == sample.labels
        assert right.double().mean().item() == pytest.approx(recorded, abs=1e-3)


def test_the_unit_has_the_beta_and_gamma_of_the_page() -> None:
    gamma, beta = (values[0].item() for values in affine(RUN.model().norm3))
    assert (
        f"the unit's $\\beta$, {beta:.2f}, and the deviation nearly its $\\gamma$, {gamma:.2f}"
        in PAGE
    )


def mistakes() -> dict[str, Callable[[], object]]:
    """Return a call for each planted mistake, by the layer or mode that is wrong."""
    conv, norm = nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6)
    named = OrderedDict(conv1=conv, sigmoid=nn.Sigmoid(), norm1=norm)
    inside: OrderedDict[str, nn.Module] = OrderedDict(block=nn.Sequential(conv, norm))
    untracked = nn.BatchNorm2d(6, track_running_stats=False)
    plain = nn.BatchNorm2d(6, affine=False)

    def changed() -> object:
        model = RUN.model().eval()
        folded = fold_batch_norm(model)
        with torch.no_grad():
            folded.get_parameter("conv2.weight")[0].mul_(1.01)
        images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
        test = Split(images, np.zeros(20, np.uint8))
        return export.verify(folded, export.reference_logits(model, images), test)

    return {
        "training mode": lambda: fold_batch_norm(nn.Sequential(conv, norm).train()),
        "activation between": lambda: fold_batch_norm(nn.Sequential(named).eval()),
        "inside a module": lambda: fold_batch_norm(nn.Sequential(inside).eval()),
        "no statistics": lambda: fold_batch_norm(nn.Sequential(conv, untracked).eval()),
        "no gamma": lambda: fold_batch_norm(nn.Sequential(conv, plain).eval()),
        "left in the graph": lambda: export.build_model(nn.Sequential(conv, norm).eval(), {}),
        "weight changed": changed,
    }


@pytest.mark.parametrize("mistake", mistakes())
def test_each_planted_mistake_gives_the_error_on_the_page(mistake: str) -> None:
    table = PAGE.split("## What goes wrong in practice")[1].split("\n## ")[0]
    quoted = [sentence.removesuffix("…)") for sentence in re.findall(r'"([^"]+)" \|', table)]
    assert len(quoted) == len(mistakes())
    with pytest.raises((ValueError, export.ExportError)) as raised:
        mistakes()[mistake]()
    assert [str(raised.value).startswith(sentence) for sentence in quoted].count(True) == 1


def test_the_bias_before_a_batch_norm_gets_no_gradient() -> None:
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
