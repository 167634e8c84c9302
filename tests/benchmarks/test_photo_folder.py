"""The benchmark of a folder of photographs: its labels, counts and contact sheet."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from benchmarks import photo_folder, photos
from benchmarks.photo_folder import Photo, Result, Row, interval, read_folder

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def trousers(background: str = "white") -> Image.Image:
    picture = Image.new("RGB", (200, 260), background)
    outline = [(60, 20), (140, 20), (150, 220), (112, 220), (100, 70), (88, 220), (50, 220)]
    ImageDraw.Draw(picture).polygon(outline, "#305070")
    return picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, background in {
        "Trouser/a.png": "white",
        "1/b.jpg": "#101010",
        "1_trousers_c.webp": "white",
        "ankle boots/pair d.png": "white",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        trousers(background).save(path)
    (tmp_path / "1" / "notes.txt").write_text("not a picture")
    (tmp_path / "1" / "damaged.jpg").write_bytes(b"not a picture")
    return tmp_path


def test_a_class_is_in_the_name_of_the_folder_or_of_the_file(folder: Path) -> None:
    found = {photo.path.name: photo for photo in read_folder(folder, CLASSES)}
    labels = {name: photo.label for name, photo in found.items()}
    assert labels == {"a.png": 1, "b.jpg": 1, "1_trousers_c.webp": 1, "pair d.png": 9} | {
        "damaged.jpg": 1
    }
    assert [name for name, photo in found.items() if photo.pair] == ["pair d.png"]
    assert (found["a.png"].background, found["b.jpg"].background) == ("light", "dark")


def test_a_photograph_without_a_class_is_an_error(folder: Path) -> None:
    trousers().save(folder / "unknown.png")
    with pytest.raises(ValueError, match=r"unknown\.png has no class"):
        read_folder(folder, CLASSES)


def test_a_cut_out_counts_as_light_and_a_pattern_as_busy(tmp_path: Path) -> None:
    transparent = trousers("black").convert("RGBA")
    transparent.putpixel((0, 0), (0, 0, 0, 0))
    for x in range(200):
        transparent.putpixel((x, 2), (0, 0, 0, 0))
    stripes = Image.fromarray(np.tile(np.repeat(np.array([0, 255], np.uint8), 20), (200, 5)))
    for picture, expected in ((transparent, "light"), (stripes, "busy")):
        path = tmp_path / "picture.png"
        picture.save(path)
        assert photo_folder.guess_background(path.read_bytes()) == expected


def test_senders_are_not_split_between_the_halves(tmp_path: Path) -> None:
    lines = ["file\tclass_index\tbackground\tnote"]
    for number in range(40):
        pair = ", pair of shoes" if number % 2 else ""
        lines.append(
            f"{number}.jpg\t{number % 10}\tbusy\tsource label X, sender {number // 4}{pair}"
        )
    (tmp_path / "photos.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    listed = read_folder(tmp_path, CLASSES)
    halves = [{photo.half for photo in listed[i : i + 4]} for i in range(0, 40, 4)]
    assert all(len(half) == 1 for half in halves)
    assert set.union(*halves) == {"development", "report"}
    assert [photo.pair for photo in listed[:2]] == [False, True]


def result(label: int, best: int | None, notes: tuple[str, ...] = ()) -> Result:
    photo = Photo(Path("a"), label, "light", pair=False, half="development")
    probabilities = None if best is None else np.eye(10, dtype=np.float32)[best]
    return Result(photo, probabilities, None, notes, 1.0)


def test_a_row_counts_right_answers_and_sure_answers() -> None:
    results = [
        result(1, 1),
        result(1, 2),
        result(1, 1, ("Not sure: …",)),
        result(1, 1, ("The background is not plain: …",)),
        result(1, None, ("refused",)),
    ]
    row = Row.of("all", results)
    assert (row.count, row.right, row.sure, row.right_of_sure) == (5, 3, 3, 2)
    assert str(row) == "| all | 5 | 0.600 | 0.23 to 0.88 | 0.60 | 0.67 |"


def test_the_interval_is_wilsons() -> None:
    """The example of Newcombe, 1998, table I: 81 of 263."""
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_a_folder_is_measured_and_drawn(folder: Path) -> None:
    sheet = folder / "sheet.png"
    arguments = ["--folder", str(folder), "--half", "all", "--sheet", str(sheet)]
    outcome = CliRunner().invoke(photos.main, arguments, catch_exceptions=False)
    last = json.loads(outcome.stdout.splitlines()[-1])
    assert last["refused"] == 1
    assert "refused: 1: The file is not a picture" in outcome.stdout
    assert last["rows"]["Trouser"][1] == 4
    assert last["rows"]["Trouser"][0] == 3
    assert last["rows"]["pairs of shoes"][1] == 1
    assert last["rows"]["all"][1] == 5
    with Image.open(sheet) as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(2**24) or []}
    assert {(255, 0, 255), (255, 255, 255)} <= colours
