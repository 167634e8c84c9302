"""What the fold saves: the graph before it, and what the page says about both graphs."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from benchmarks import fold
from training.export import build_model
from training.fitting.run import Run
from training.folding import fold_batch_norm
from training.model import BNLeNet

PAGE = (Path(__file__).parents[2] / "docs" / "batch-norm.md").read_text()


@pytest.fixture(scope="module")
def model() -> BNLeNet:
    run = Run(fold.RUN)
    return run.model(run.config().recipe.statistics)


def test_the_graph_before_the_fold_predicts_what_the_model_predicts(model: BNLeNet) -> None:
    graph = fold.unfolded(model)
    assert [node.op_type for node in graph.graph.node].count("BatchNormalization") == 4
    pixels = np.random.default_rng(0).integers(0, 256, (9, 1, 28, 28), np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).float() / 255).softmax(1).numpy()
    for optimise in (True, False):
        (found,) = fold.session(graph, optimise=optimise).run(None, {"pixels": pixels})
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_nodes_and_bytes_are_as_the_page_says(model: BNLeNet) -> None:
    graphs = {"before": fold.unfolded(model), "after": build_model(fold_batch_norm(model), {})}
    for name, graph in graphs.items():
        assert f"| {name} the fold | {len(graph.graph.node)} | {graph.ByteSize():,} |" in PAGE


@pytest.mark.skipif(
    not onnxruntime.__version__.startswith("1.31."), reason="the page speaks of this version"
)
def test_onnx_runtime_folds_what_the_page_says(model: BNLeNet) -> None:
    """The two after convolutions, but not the two after linear layers."""
    assert "no: two `BatchNormalization` nodes stay" in PAGE
    assert fold.norms_left(fold.unfolded(model)) == 2


def test_the_command_prints_both_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "BLOCKS", 1)
    monkeypatch.setattr(fold, "RUNS", 1)
    lines = CliRunner().invoke(fold.main).output.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == [
        "| before the fold",
        "| after the fold",
    ]
    assert "batch norms unfolded" in lines[5]
