from pathlib import Path

import pytest

from training.fitting.run import RunError
from training.studies.records import Records

CONDITIONS = {"epochs": 3}


def test_measurements_under_other_conditions_are_not_mixed(tmp_path: Path) -> None:
    Records(tmp_path / "a.jsonl", CONDITIONS).add({"seed": 0})
    with pytest.raises(
        RunError, match=r"a\.jsonl was started with epochs 3, not 5: choose another"
    ):
        Records(tmp_path / "a.jsonl", {"epochs": 5})
    assert Records(tmp_path / "a.jsonl", CONDITIONS).lines == [{"seed": 0}]


@pytest.mark.parametrize("text", ["", "{", '{"epochs": 3}\n{"seed"'])
def test_damaged_measurements_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(RunError, match=r"a\.jsonl is damaged .*: delete it"):
        Records(tmp_path / "a.jsonl", CONDITIONS)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .* \(.+\): choose another --out"):
        Records(tmp_path / "file" / "a.jsonl", CONDITIONS).add({"seed": 0})
    with pytest.raises(RunError, match=r"cannot read .* \(.+\): choose another --out"):
        Records(tmp_path, CONDITIONS)
