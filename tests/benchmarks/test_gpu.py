"""The parts of `make gpu`, on the CPU and on little data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu
from benchmarks.load import BenchmarkError
from benchmarks.page import with_section
from benchmarks.training import first
from training.dataset import FashionMNIST

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


@pytest.fixture
def few(fashion_mnist: FashionMNIST, monkeypatch: pytest.MonkeyPatch) -> FashionMNIST:
    """Give the benchmark a small part of the data; --quick takes a part of it again."""
    train, test = (first(split, 2) for split in (fashion_mnist.train, fashion_mnist.test))
    few = replace(fashion_mnist, train=train, test=test)
    monkeypatch.setattr(gpu, "load", lambda: few)
    return few


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_every_part_runs_without_a_gpu_and_fills_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Speed\n\n{gpu.BEGIN}\nold\n{gpu.END}\nThe rest.\n")
    result = CliRunner().invoke(gpu.main, ["--device", "cpu", "--quick", "--write", str(page)])
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert float(rows[gpu.SELF_TEST]["cpu"]) <= 1e-5
    assert float(rows[gpu.DIFFERENCE]["cpu"]) == 0  # the CPU's from the CPU's
    assert float(rows[gpu.FIT]["cpu"]) > 0
    text = page.read_text()
    assert text.startswith("# Speed\n")
    assert text.endswith("\nThe rest.\n")
    assert "old" not in text
    name = gpu.trained("ours", 2048)
    assert f"| {name} | {rows[name]['cpu']} |  | > 1,200,000 |" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    if shutil.which("wrk"):
        assert result.exit_code == 0, result.output
        assert rows.keys() == gpu.GOALS.keys()
        assert gpu.MISSING not in text
    else:
        assert "serving on cpu: wrk is needed" in result.stderr


@pytest.mark.usefixtures("few")
def test_a_part_that_fails_is_reported_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> gpu.Figures:
        raise RuntimeError("the device fell off the bus\nand more")

    def unserved(*_: object) -> gpu.Figures:
        raise BenchmarkError("python -m service did not start:\na warning\nError: no device")

    for name in ("time_fits", "time_steps", "compare"):
        monkeypatch.setattr(gpu, name, broken)
    monkeypatch.setattr(gpu, "time_serving", unserved)
    monkeypatch.setattr(gpu, "run_tests", lambda _: {gpu.PASSED: {"cpu": "6 passed"}})
    result = CliRunner().invoke(gpu.main, ["--device", "cpu", "--quick"])
    assert result.exit_code == 1
    assert "fits on cpu: the device fell off the bus\n" in result.stderr
    assert "serving on cpu: python -m service did not start: Error: no device\n" in result.stderr
    assert "agreement: the device fell off the bus\n" in result.stderr
    assert f"| {gpu.PASSED} | 6 passed |" in result.stdout
    assert f"| {gpu.SELF_TEST} | not measured |" in result.stdout


def test_a_failing_test_is_a_failing_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TESTS", "tests/there_is_none.py")
    with pytest.raises(BenchmarkError, match=r": run pytest tests/there_is_none\.py"):
        gpu.run_tests("cpu")


def test_the_table_has_the_gpus_and_the_cpus_figures() -> None:
    figures = {gpu.SETUP: {"cuda": "0.31", "cpu": "0.02"}}
    lines = gpu.table(figures, "cuda", {"gpu": "a large one", "torch": "9"}).splitlines()
    assert lines[0] == "|  | GPU | CPU of the same machine | goal |"
    assert f"| {gpu.SETUP} | 0.31 | 0.02 |  |" in lines
    assert lines[-1] == "Measured on: gpu a large one, torch 9."


def test_without_a_gpu_its_column_says_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(gpu.main, [])
    assert result.exit_code == 1
    assert "torch finds no CUDA device here" in result.stderr


def test_the_committed_page_has_a_table_of_every_row() -> None:
    """It has the same rows before and after a GPU is measured; before, it says "not measured"."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(gpu.BEGIN)
    committed, end, _ = rest.partition(gpu.END)
    assert end
    names = [line.split("|")[1] for line in committed.splitlines() if line.startswith("|")]
    wanted = [line.split("|")[1] for line in gpu.table({}).splitlines() if line.startswith("|")]
    assert names == wanted
    assert with_section(
        PAGE.read_text(encoding="utf-8"), committed.strip("\n") + "\n", gpu.BEGIN, gpu.END
    ) == (PAGE.read_text(encoding="utf-8"))


def test_a_page_without_marks_is_not_written() -> None:
    with pytest.raises(ValueError, match="the page lacks"):
        with_section("# Speed\n", "text", gpu.BEGIN, gpu.END)
