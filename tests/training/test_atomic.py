from pathlib import Path

import pytest

from training.atomic import write_whole


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    for data in (b"old and longer", b"new"):
        write_whole(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == data
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_the_file_itself_is_never_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it were, a kill between two bytes would leave it incomplete."""
    written, write = [], Path.write_bytes

    def note(path: Path, data: bytes) -> int:
        written.append(path)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", note)
    write_whole(tmp_path / "a", b"new")
    assert len(written) == 1
    assert written[0] != tmp_path / "a"
    assert written[0].parent == tmp_path  # elsewhere it might be on another disk


def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a'"):
        write_whole(tmp_path / "a", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_whole(tmp_path / "folder", b"new")
    with pytest.raises(FileNotFoundError, match="none/a"):
        write_whole(tmp_path / "none" / "a", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
