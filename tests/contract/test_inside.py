"""The page at /inside shows the numbers of the service and of torch, for any batch."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from playwright.sync_api import BrowserContext, Page, Route, expect
from safetensors.torch import load_file

from tests.contract.browser import CONTRASTS, draw, gray, in_hash, opened, visited
from tests.contract.conftest import Serve
from tests.service.conftest import seal
from training.dataset import CLASS_NAMES
from training.export import self_test_pixels
from training.model import BNLeNet

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "bn_lenet.onnx"
RUN = "/static/run.safetensors"
STAGES = """async ([images, own, fold]) => {
  const network = await import("./static/network.js");
  const response = await fetch("static/run.safetensors");
  let model = network.parse(await response.arrayBuffer());
  if (fold) model = network.fold(model);
  const stages = network.run(model, images, own);
  return Object.fromEntries(Object.entries(stages).map(([name, stage]) =>
    [name, stage.batch.map((values) => [...values])]));
}"""


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """Return the self-test's images, uint8 [6, 28, 28]: stripes from a formula."""
    return self_test_pixels()


@pytest.fixture
def inside(tab: Page, base_url: str, images: NDArray[np.uint8]) -> Iterator[Page]:
    """Open the page with the third of the images."""
    with visited(tab, base_url, in_hash(images[2].ravel())) as page:
        expect(page.locator("#verdict")).not_to_be_empty()
        yield page


def answers(page: Page, column: str) -> list[float]:
    """Return the probabilities in a column of the table, by class."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    cells = page.locator(f"#answers .{column} data")
    values: list[float] = cells.evaluate_all("(cells) => cells.map((cell) => Number(cell.value))")
    assert len(values) == 10
    return values


def look_at(page: Page, pixels: NDArray[np.uint8]) -> None:
    """Give the page another picture, by its address."""
    _, _, fragment = in_hash(pixels.ravel()).partition("#")
    page.evaluate("(fragment) => { location.hash = fragment; }", fragment)


def served(client: httpx.Client, pixels: NDArray[np.uint8]) -> list[float]:
    """Return ONNX Runtime's probabilities, by class."""
    headers = {"content-type": "application/octet-stream"}
    answer = client.post("/predict", content=pixels.tobytes(), headers=headers).json()
    by_class = {each["class_id"]: each["probability"] for each in answer["predictions"]}
    return [by_class[i] for i in range(10)]


def reference(images: NDArray[np.uint8], own: bool) -> dict[str, NDArray[np.float64]]:
    """Return torch's values after each layer of the committed run, in float64."""
    run = load_file(MODEL.parent / "run" / "checkpoint.safetensors")
    metadata = {entry.key: entry.value for entry in onnx.load(MODEL).metadata_props}
    network = BNLeNet()
    for key, tensor in run.items():
        _, _, rest = key.partition("population.")
        if rest and metadata["statistics"] == "population":
            norm, _, what = rest.partition(".")
            run[f"{norm}.running_{'mean' if what == 'mean' else 'var'}"] = tensor
    network.load_state_dict({k: v for k, v in run.items() if not k.startswith("population.")})
    network.double().train(own)
    values = torch.from_numpy(images).double().unsqueeze(1) / 255
    found = {}
    with torch.no_grad():
        for name, layer in network.named_children():
            values = layer(values)
            found[name] = values.reshape(len(images), -1).numpy()
        probabilities = torch.softmax(values / float(metadata["temperature"]), 1)
    found["probabilities"] = probabilities.numpy()
    del found["flatten"]
    return found


@pytest.mark.parametrize("own", [False, True])
def test_stages_are_those_of_torch(inside: Page, images: NDArray[np.uint8], own: bool) -> None:
    """Before and after each norm, sigmoid and pooling, with either kind of statistics."""
    found = inside.evaluate(STAGES, [images.reshape(6, -1).tolist(), own, False])
    assert found.pop("input") == (images.reshape(6, -1) / 255).tolist()
    expected = reference(images, own)
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6, err_msg=name)


def test_each_stage_shows_its_values_and_their_mean_and_deviation(
    inside: Page, images: NDArray[np.uint8]
) -> None:
    """Values are orange above zero and blue below, deepest at 6 after a norm."""
    answers(inside, "fixed")  # waits until all is drawn
    expected = reference(images[2:3], own=False)
    for name in [*expected][:-2]:  # the last layer and the probabilities are in the table
        shown = (
            inside.locator(f"#{name} .numbers").first.inner_text().replace("\N{MINUS SIGN}", "-")
        )
        figures = [float(number) for number in shown.split(" ± ")]
        values = expected[name]
        assert figures == pytest.approx([values.mean(), values.std()], abs=0.0051), name
    ground, width, data = inside.evaluate(
        """() => {
        const maps = document.querySelector("#norm1 .maps");
        const { data, width } = maps.getContext("2d").getImageData(0, 0, maps.width, maps.height);
        const style = getComputedStyle(document.documentElement);
        return [style.getPropertyValue("--surface").trim(), width, [...data]];
        }"""
    )
    digits = ground[1:] if len(ground) == 7 else "".join(2 * digit for digit in ground[1:])
    colours = np.array(data).reshape(-1, width, 4)[..., :3]
    maps = expected["norm1"].reshape(2, 3, 24, 24)  # two rows of three channels, a pixel apart
    for row, column in np.ndindex(2, 3):
        value = maps[row, column][..., None]
        end = np.where(value > 0, [255, 110, 30], [60, 130, 255])
        start = np.array([*bytes.fromhex(digits)])
        colour = start + np.minimum(1, np.abs(value) / 6) * (end - start)
        part = colours[25 * row : 25 * row + 24, 25 * column : 25 * column + 24]
        np.testing.assert_allclose(part, colour, rtol=0, atol=1)


def test_folded_network_has_no_norms_and_the_same_numbers(
    inside: Page, images: NDArray[np.uint8]
) -> None:
    found = inside.evaluate(STAGES, [images.reshape(6, -1).tolist(), False, True])
    assert not any(name.startswith("norm") for name in found)
    expected = reference(images, own=False)
    for number, layer in enumerate(("conv1", "conv2", "linear1", "linear2"), 1):
        np.testing.assert_allclose(found[layer], expected[f"norm{number}"], atol=1e-5)
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-6)


def test_answer_is_the_services(
    inside: Page, client: httpx.Client, images: NDArray[np.uint8]
) -> None:
    for pixels in images:
        look_at(inside, pixels)
        expected = served(client, pixels)
        assert answers(inside, "fixed") == pytest.approx(expected, abs=1e-4)
        assert answers(inside, "folded") == pytest.approx(expected, abs=1e-4)
        assert (gray(inside, "given") == pixels).all()
    model = client.get("/readyz").json()["model"]
    expect(inside.locator("#revision")).to_have_text(model["revision"])


@pytest.mark.parametrize("second", [False, True])
def test_a_second_model_is_mentioned(inside: Page, client: httpx.Client, second: bool) -> None:
    """On the first page, it may have answered the same pixels with other numbers."""
    ready = client.get("/readyz").json()
    other = ready["model"] | ({"revision": "0" * 12} if second else {})
    inside.route(
        "**/readyz", lambda route: route.fulfill(json=ready | {"picture_model": other}), times=1
    )
    inside.reload()
    expect(inside.locator("#verdict")).to_contain_text("%")
    expect(inside.locator("#second")).to_be_visible(visible=second)


def test_drawing_is_followed_live(inside: Page, client: httpx.Client) -> None:
    requests: list[str] = []
    inside.on("request", lambda request: requests.append(request.url))
    seen: set[tuple[float, ...]] = set()
    for line in ([(0.3, 0.2), (0.7, 0.2)], [(0.7, 0.2), (0.7, 0.8)], [(0.7, 0.8), (0.3, 0.2)]):
        draw(inside, *line)
        seen.add(tuple(answers(inside, "fixed")))
        pixels = gray(inside, "given")
        assert answers(inside, "fixed") == pytest.approx(served(client, pixels), abs=1e-4)
    assert len(seen) == 3
    assert requests == []  # everything runs in the browser
    assert pixels.max() == 255
    assert pixels.any(axis=1).all() or pixels.any(axis=0).all()  # 28 pixels on the longer edge
    for axis in (
        0,
        1,
    ):  # centred; an odd margin is larger on the left and above, as in the data set
        filled = np.flatnonzero(pixels.any(axis=axis))
        assert filled[0] - (27 - filled[-1]) in (0, 1)


def test_drawing_stays_in_view_on_a_phone(inside: Page) -> None:
    """So that the stages can be watched while one draws."""
    inside.set_viewport_size({"width": 375, "height": 667})
    inside.locator("#norm2").evaluate("(figure) => figure.scrollIntoView({ block: 'end' })")
    before = answers(inside, "fixed")
    draw(inside, (0.2, 0.2), (0.8, 0.8))
    assert answers(inside, "fixed") != before
    paper, maps = (inside.locator(name).bounding_box() for name in ("#paper", "#norm2 .maps"))
    assert paper is not None
    assert maps is not None
    assert paper["y"] >= 0
    assert paper["y"] + paper["height"] < maps["y"] < 667 - maps["height"]


def test_other_pictures_change_the_answer_of_batch_statistics_alone(
    inside: Page, images: NDArray[np.uint8]
) -> None:
    fixed, alone = answers(inside, "fixed"), answers(inside, "batch")
    inside.locator("[value=batch]").check()
    expect(inside.locator("#comment")).to_contain_text("Every picture gets this answer")
    look_at(inside, images[4])
    assert answers(inside, "fixed") != pytest.approx(fixed, abs=1e-3)
    third = [
        inside.evaluate(STAGES, [[images[k].ravel().tolist()], True, False])["norm3"]
        for k in (1, 4)
    ]
    assert third[0] == third[1]
    assert answers(inside, "batch") == pytest.approx(alone)  # a batch of one always gives the same
    fixed = answers(inside, "fixed")
    inside.get_by_role("list", name="Other pictures").get_by_role("button", name="Bag").click()
    with_bag = answers(inside, "batch")
    assert with_bag != pytest.approx(alone, abs=1e-3)
    inside.get_by_role("button", name="Add your picture").click()
    inside.get_by_role("button", name="All ten").click()
    expect(inside.locator("#count")).to_have_text("11 others")
    assert answers(inside, "batch") != pytest.approx(with_bag, abs=1e-3)
    inside.get_by_role("button", name="Your picture; remove it").click()
    expect(inside.locator("#count")).to_have_text("10 others")
    inside.get_by_role("button", name="None").click()
    assert answers(inside, "batch") == pytest.approx(alone)
    assert answers(inside, "fixed") == fixed


def test_switch_shows_what_the_norms_do(inside: Page) -> None:
    def shown(name: str) -> str:
        answers(inside, "fixed")  # waits until all is drawn
        maps = inside.locator(f"#{name} .maps")
        data: str = maps.evaluate("(canvas) => canvas.toDataURL()")
        return data

    inside.get_by_role("button", name="All ten").click()
    fixed = {name: shown(name) for name in ("conv1", "norm1", "sigmoid1", "linear2", "norm4")}
    assert len(set(fixed.values())) == 5
    inside.locator("[value=batch]").check()
    assert shown("conv1") == fixed["conv1"]
    assert all(shown(name) != fixed[name] for name in ("norm1", "sigmoid1", "norm4"))
    inside.locator("[value=folded]").check()
    assert shown("sigmoid1") == fixed["sigmoid1"]
    expect(inside.locator("#norm1 figcaption")).to_have_text("The norm is gone")
    expect(inside.locator("#norm1 .maps")).to_be_hidden()
    expect(inside.locator("#comment")).to_contain_text("The answer is the same")


def test_verdict_and_comment_are_of_the_column_that_is_shown(inside: Page) -> None:
    inside.get_by_role("list", name="Other pictures").get_by_role("button", name="Bag").click()
    columns = {mode: answers(inside, mode) for mode in ("fixed", "batch", "folded")}
    best = {
        mode: f"{CLASS_NAMES[values.index(max(values))]}, {100 * max(values):.1f}\u00a0%"
        for mode, values in columns.items()
    }
    assert best["fixed"] != best["batch"]
    for mode, verdict in best.items():
        inside.locator(f"[value={mode}]").check()
        expect(inside.locator("#verdict")).to_have_text(verdict)
        first = inside.locator("tr", has=inside.locator(f".{mode}.first")).locator("th")
        expect(first).to_have_text(verdict.partition(",")[0])
        comment = inside.locator("#comment")
        if mode == "batch":
            expect(comment).to_contain_text("mean and variance of these 2 pictures")
            expect(comment).to_contain_text(best["fixed"])
    found = re.search(r"difference is (\S+)\.", comment.inner_text())
    assert found is not None
    difference = np.abs(np.subtract(columns["folded"], columns["fixed"])).max()
    assert float(found[1]) == pytest.approx(difference, rel=0.5)  # it is shown with one digit


@pytest.mark.parametrize("count", [0, 783, 785])
def test_an_address_without_784_pixels_changes_nothing(
    inside: Page, images: NDArray[np.uint8], count: int
) -> None:
    look_at(inside, np.resize(images[4], count))
    answers(inside, "fixed")  # waits until all is drawn
    assert (gray(inside, "given") == images[2]).all()


def test_another_model_is_not_shown_as_this_one(
    context: BrowserContext, serve: Serve, tmp_path: Path
) -> None:
    """The page shows the committed run, so it refuses other models."""
    model = onnx.load(MODEL)
    for entry in model.metadata_props:
        if entry.key == "seed":
            entry.value = "12345"
    other = tmp_path / "other.onnx"
    other.write_bytes(seal(model))
    with serve(model_path=other) as (url, _):
        response = httpx.get(f"{url}{RUN}")
        assert response.status_code == 404
        with opened(context, url, "/inside") as page:
            expect(page.get_by_role("alert")).to_have_text(response.json()["error"])
            expect(page.locator("#network")).to_be_hidden()


def test_weights_are_those_of_the_run_in_its_format(client: httpx.Client, tmp_path: Path) -> None:
    response = client.get(RUN)
    path = tmp_path / "run.safetensors"
    path.write_bytes(response.content)
    ours, theirs = load_file(path), load_file(MODEL.parent / "run" / "checkpoint.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (length,) = struct.unpack("<Q", response.content[:8])
    metadata = {entry.key: entry.value for entry in onnx.load(MODEL).metadata_props}
    about = json.loads(response.content[8 : 8 + length])["__metadata__"]
    assert about["statistics"] == metadata["statistics"]
    assert about["temperature"] == metadata["temperature"]
    again = client.get(RUN, headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_can_be_tried_again(inside: Page) -> None:
    def fail(route: Route) -> None:
        route.abort()

    inside.route("**/run.safetensors", fail, times=1)
    inside.reload()
    expect(inside.get_by_role("alert")).to_contain_text("cannot be reached")
    inside.get_by_role("button", name="Try again").click()
    expect(inside.locator("#verdict")).to_contain_text("%")


def test_can_be_read_in_both_schemes_on_any_screen(inside: Page) -> None:
    for dark in (False, True):
        inside.emulate_media(color_scheme="dark" if dark else "light")
        texts = inside.evaluate(CONTRASTS)
        assert len(texts) > 60
        assert [(text, ratio) for text, ratio in texts if ratio < 4.5] == []
    for width in (320, 800):
        inside.set_viewport_size({"width": width, "height": 700})
        assert inside.evaluate("document.documentElement.scrollWidth") <= width
    for control in inside.locator("button, input, canvas[role]").filter(visible=True).all():
        expect(control).to_have_accessible_name(re.compile(r"\w"))
