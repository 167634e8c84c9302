"""Every study runs from end to end, is resumed, and gives the same on a cluster."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from training.__main__ import main
from training.dataset import FashionMNIST
from training.studies import STUDIES, parts, runner
from training.studies.runner import begin, lines_of, missing, run, write
from training.studies.study import QUICK, Line, Scale, arms, by_seed

TINY = Scale(images=128, epochs=1, seeds=2, quick=True)
LONG = {"learning-rate", "covariate-shift"}  # half of the time of all; `make test-all` runs them


def study(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["study", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def small_data(few: FashionMNIST) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_data", lambda _: few)
        yield


@pytest.fixture(scope="module")
def whole(few: FashionMNIST, tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """Return the measurements of one study, taken without a stop on this machine."""
    records = begin(parts.STUDY, tmp_path_factory.mktemp("whole"), few.sha256)
    run(parts.STUDY, records, TINY, jobs=1)
    return lines_of(parts.STUDY, records, TINY)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in STUDIES],
)
def test_a_study_runs_from_end_to_end_and_measures_nothing_twice(
    name: str, few: FashionMNIST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = STUDIES[name]
    records = begin(chosen, tmp_path, few.sha256)
    run(chosen, records, TINY, jobs=1)
    report = write(chosen, records, TINY, tmp_path)
    page = (tmp_path / f"{name}.md").read_text()
    assert page.startswith(f"# {chosen.title}\n\n**{report.answer}**\n")
    assert report.answer.endswith(".")
    assert "nan" not in page.lower().replace("finance", "")
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.width > 400

    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(runner, "_measure", fail)
    monkeypatch.setattr(runner, "save_figure", lambda *_: None)  # it takes most of the time
    again = begin(chosen, tmp_path, few.sha256)
    assert missing(chosen, again, TINY) == []
    run(chosen, again, TINY, jobs=1)
    assert write(chosen, again, TINY, tmp_path) == report
    assert (tmp_path / f"{name}.md").read_text() == page


def test_a_stopped_study_is_continued(few: FashionMNIST, tmp_path: Path, whole: list[Line]) -> None:
    def stop(_: Line) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(parts.STUDY, begin(parts.STUDY, tmp_path, few.sha256), TINY, jobs=1, on_line=stop)
    records = begin(parts.STUDY, tmp_path, few.sha256)
    assert len(records.lines) == 2
    run(parts.STUDY, records, TINY, jobs=1)
    assert lines_of(parts.STUDY, records, TINY) == whole


def test_a_cluster_measures_what_this_machine_measures(
    few: FashionMNIST, tmp_path: Path, whole: list[Line]
) -> None:
    """A real Dask scheduler and worker, reached by address; the worker is a thread of this test."""
    from distributed import LocalCluster  # noqa: PLC0415 - slow to import, and only needed here

    remote = begin(parts.STUDY, tmp_path / "remote", few.sha256)
    with LocalCluster(  # type: ignore[no-untyped-call] # untyped there
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        run(parts.STUDY, remote, TINY, cluster=cluster.scheduler_address)
    assert lines_of(parts.STUDY, remote, TINY) == whole


def test_a_missing_scheduler_is_an_error_of_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CONNECT_SECONDS", 0.3)
    result = study("parts", "--quick", "--out", tmp_path, "--cluster", "tcp://127.0.0.1:1")
    assert result.exit_code == 1
    assert "Error: no Dask scheduler answers at tcp://127.0.0.1:1" in result.output
    assert len(result.output.strip().splitlines()) == 1


class TestCommand:
    def test_it_prints_each_answer_and_where_its_page_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("training.studies.command.QUICK", TINY)
        result = study("parts", "--quick", "--jobs", 1, "--out", tmp_path, "--json")
        assert result.exit_code == 0, result.output
        printed = json.loads(result.stdout)
        assert printed["study"] == "parts"
        assert printed["answer"] in (tmp_path / "parts.md").read_text()
        assert printed["scale"]["quick"] is True

    def test_the_list_has_every_study_and_its_question(self) -> None:
        lines = study("--list").output.splitlines()
        assert [line.split()[0] for line in lines] == list(STUDIES)
        assert all(line.endswith("?") for line in lines)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ((), "name a study, or use --all"),
            (("unheard-of",), "'unheard-of' is not one of"),
            (("parts", "--jobs", 0), "--jobs must be -1 or at least 1"),
            (("parts", "--seeds", 1), "1 is not in the range x>=2"),
        ],
    )
    def test_misuse_is_one_sentence_and_exit_code_2(
        self, arguments: tuple[object, ...], sentence: str
    ) -> None:
        result = study(*arguments)
        assert result.exit_code == 2
        assert sentence in result.output


def test_seeds_vary_slowest() -> None:
    tasks = arms(TINY, norm=["a", "b"])
    assert [(task["seed"], task["norm"]) for task in tasks] == [
        *((0, "a"), (0, "b")),
        *((1, "a"), (1, "b")),
    ]
    assert all(task["images"] == 128 and task["epochs"] == 1 for task in tasks)


def test_figures_come_in_the_order_of_the_seeds() -> None:
    lines = [{"seed": s, "norm": n, "x": 10 * s + len(n)} for s in (2, 0, 1) for n in ("a", "bb")]
    assert by_seed(lines, "x", norm="bb") == [2, 12, 22]


def test_a_quick_run_is_small() -> None:
    """`--quick` is for tests: with it, no study may have more than a hundred tiny tasks."""
    for chosen in STUDIES.values():
        tasks = chosen.tasks(QUICK)
        assert 0 < len(tasks) <= 100
        assert all(task["images"] <= 512 for task in tasks)
