"""The committed pages follow from the committed measurements."""

from pathlib import Path

import pytest

from training.studies import STUDIES
from training.studies.records import Records
from training.studies.runner import lines_of, missing, overview, page
from training.studies.study import Scale

FOLDER = Path(__file__).parents[3] / "docs" / "studies"
COMMITTED = sorted(path.stem for path in FOLDER.glob("*.jsonl"))


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_pages_are_made_from_the_committed_measurements(name: str) -> None:
    study, records = STUDIES[name], Records(FOLDER / f"{name}.jsonl")
    scale = Scale(seeds=1 + max(line["seed"] for line in records.lines))
    assert missing(study, records, scale) == []
    written = page(study, study.report(lines_of(study, records, scale)), records, scale)
    assert (FOLDER / f"{name}.md").read_text() == written


def test_the_overview_has_the_answer_and_figure_of_every_committed_study() -> None:
    written = (FOLDER / "README.md").read_text()
    assert written == overview(STUDIES.values(), FOLDER)
    assert len(COMMITTED) >= 2
    for name in STUDIES:
        assert (f"\n![{STUDIES[name].title}]({name}.png)\n" in written) == (name in COMMITTED)
        assert (f"`{name}`" in written) != (name in COMMITTED)
    for name in COMMITTED:
        answer = (FOLDER / f"{name}.md").read_text().splitlines()[2]
        assert f"\n{answer.strip('*')}\n" in written
