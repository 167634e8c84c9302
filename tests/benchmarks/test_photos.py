"""The benchmark of photographs, on a few test images."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import photos


@pytest.mark.slow
@pytest.mark.usefixtures("fashion_mnist")
def test_photographs_are_measured_in_every_scene() -> None:
    result = CliRunner().invoke(photos.main, ["20"])
    assert result.exit_code == 0, result.output
    *table, line = result.stdout.splitlines()
    rows = json.loads(line)["rows"]
    assert [row["ground"] for row in rows[4:]] == list(photos.SCENES)
    assert len(table) == 2 + len(rows)
    for row in rows:
        assert row["accuracy"] * 20 == pytest.approx(round(row["accuracy"] * 20))
        assert row["accuracy"] > 0.6
        assert row["milliseconds"] > 0
