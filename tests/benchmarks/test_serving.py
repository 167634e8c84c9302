"""The arithmetic of the serving benchmark, on made-up samples that show every wrong ratio."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from benchmarks import serving
from benchmarks.load import BenchmarkError, Cores, Requests, Sample, Server
from benchmarks.page import with_section
from benchmarks.serving import (
    BATCHES,
    BYTES,
    FLOOR,
    FRAMEWORK,
    JSON,
    NOOP,
    PNG,
    Findings,
    Row,
    binary_class,
    binary_head,
    open_inference_class,
    open_inference_json,
    plain_json,
    png,
    show,
)

SERVER = Server(port=8123, seconds_to_ready=0.5, session=0)
STEP = {
    "1": {"alone": 50.0, "tight_loop": 40.0, "an_image": 45.0, "batch": 1.0},
    "16": {
        "alone": 70.0,
        "tight_loop": 40.0,
        "an_image": 30.0,
        "batch": 6.5,
        "batched": 5e5,
        "batched_256": 5e4,
    },
}
IMAGE = (np.arange(784) % 256).astype(np.uint8).reshape(28, 28)


def sampled(name: str, rates: dict[int, Sequence[float]], p50: float = 2, p99: float = 5) -> Row:
    samples = {c: [Sample(rate, p50, p99) for rate in of_c] for c, of_c in rates.items()}
    return Row(name, SERVER, Requests("/predict", {}, []), None, samples=samples)


def rows() -> dict[str, Row]:
    """Make three rounds; in the second, everything runs at half speed."""
    made = [
        sampled(NOOP, {1: [300, 150, 300], 16: [2000, 1000, 2000], 256: [2000, 1000, 2000]}),
        sampled(FRAMEWORK, {1: [40, 20, 40], 16: [360, 180, 361], 256: [300, 150, 300]}),
        sampled(FLOOR, {1: [100, 50, 100], 16: [1000, 500, 1000], 256: [900, 450, 900]}),
        sampled(BYTES, {1: [80, 40, 81], 16: [900, 450, 901], 256: [810, 405, 812]}),
        sampled(JSON, {1: [60, 30, 60], 16: [600, 300, 603], 256: [500, 250, 500]}),
        sampled(PNG, {1: [50, 25, 50], 16: [540, 270, 541], 256: [400, 200, 400]}),
        sampled(BATCHES, {1: [20, 10, 20], 16: [70, 35, 71]}),
        replace(sampled("MLServer", {1: [30, 15, 30], 16: [100, 50, 100]}), is_peer=True),
    ]
    return {row.name: row for row in made}


def test_findings_are_medians_of_ratios_within_a_round() -> None:
    found = Findings.of(rows(), starts=[0.9, 0.4, 0.5], megabytes=120.0, step=STEP)
    assert asdict(found) == pytest.approx(
        {
            "bound_16": 1000.0,  # 1 / (1/2000 + 500 µs)
            "bytes_of_bound_16": 0.9,
            "framework_of_bytes_16": 0.4,
            "bytes_of_floor_1": 0.8,
            "bytes_of_floor_16": 0.9,
            "json_of_mlserver_16": 6.0,
            "png_of_bytes_16": 0.6,
            "p99_of_p50_16": 2.5,
            "rate_256_of_16": 0.9,
            "batches_of_tight_loop_16": 0.896,  # 70 a second times 256 images of 50 µs
            "model_step_of_tight_loop_1": 1.25,
            "model_step_of_tight_loop_16": 0.75,
            "start_seconds": 0.5,
            "megabytes": 120.0,
        }
    )


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    """In one round only the first is slow, in another only the second."""
    both = rows()
    both[FLOOR] = sampled(FLOOR, {1: [100, 10, 100], 16: [1000, 100, 1000]})
    both[BYTES] = sampled(BYTES, {1: [90, 90, 9], 16: [900, 900, 90], 256: [1, 1, 1]})
    found = Findings.of(both, [1.0], 1.0, STEP)
    assert found.bytes_of_floor_1 == pytest.approx(0.9)  # of 0.9, 9 and 0.09
    assert found.bytes_of_floor_16 == pytest.approx(0.9)


def test_without_mlserver_its_ratio_is_not_measured() -> None:
    ours = {name: row for name, row in rows().items() if name != "MLServer"}
    assert Findings.of(ours, [1.0], 1.0, STEP).json_of_mlserver_16 is None


def test_rounds_that_do_not_match_are_refused() -> None:
    odd = rows()
    del odd[FLOOR].samples[16][0]
    with pytest.raises(ValueError, match="zip"):
        Findings.of(odd, [1.0], 1.0, STEP)


def test_a_rows_figures_are_medians_over_the_rounds() -> None:
    row = rows()[BYTES]
    row.samples[16] = [Sample(1, 30, 200), Sample(3, 10, 400), Sample(2, 20, 300)]
    assert [row.median(16, what) for what in ("rate", "p50", "p99")] == [2, 20, 300]


@pytest.mark.parametrize(
    ("name", "met", "missed"),
    [
        ("bytes_of_floor_16", 0.85, 0.849),
        ("json_of_mlserver_16", 3.0, 2.99),
        ("png_of_bytes_16", 0.65, 0.649),
        ("bytes_of_bound_16", 0.6, 0.599),
        ("p99_of_p50_16", 4.0, 4.01),
        ("rate_256_of_16", 0.9, 0.89),
        ("batches_of_tight_loop_16", 0.85, 0.849),
        ("model_step_of_tight_loop_1", 1.3, 1.31),
        ("model_step_of_tight_loop_16", 1.3, 1.31),
        ("start_seconds", 1.0, 1.01),
        ("megabytes", 150.0, 150.1),
    ],
)
def test_a_value_equal_to_its_goal_meets_it(
    name: str, met: float, missed: float, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = Findings.of(rows(), [0.5], 100.0, STEP)
    words = serving.GOALS[name][0]
    outcomes = []
    for value in (met, missed, None):
        spoiled = Findings(**(asdict(findings) | {name: value}))
        show(rows(), {"BN-LeNet": 100.0}, spoiled, {"machine": {}, "model_step": {}})
        (line,) = (line for line in capsys.readouterr().out.splitlines() if words in line)
        outcomes.append(line.replace("│", " ").split()[-1])
    assert outcomes[:2] == ["met", "missed"]
    assert serving.GOALS.keys() <= asdict(findings).keys()


def test_a_missing_figure_says_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    ours = {name: row for name, row in rows().items() if name != "MLServer"}
    findings = Findings.of(ours, [0.5], 100.0, STEP)
    show(ours, {"BN-LeNet": 100.0}, findings, {"machine": {"cores": "2"}, "model_step": STEP})
    printed = capsys.readouterr().out
    assert "cores 2" in printed
    (line,) = (line for line in printed.splitlines() if "JSON / MLServer" in line)
    assert "not measured" in line


def test_the_table_has_every_rows_medians(capsys: pytest.CaptureFixture[str]) -> None:
    findings = Findings.of(rows(), [0.5], 100.0, STEP)
    memory = {"MLServer": 400.4, "BN-LeNet": 99.6}
    show(rows(), memory, findings, {"machine": {}, "model_step": {"16": STEP["16"]}})
    printed = capsys.readouterr().out
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in printed.splitlines()
        if line.count("│") > 9
    }
    assert cells[BYTES] == [
        "80",
        "2.00",
        "5.00",
        "900",
        "2.00",
        "5.00",
        "810",
        "2.00",
        "5.00",
        "0.90",
    ]
    assert cells["MLServer"] == ["30", "2.00", "5.00", "100", "2.00", "5.00", "", "", "", "0.10"]
    assert "MLServer 400 MB, BN-LeNet 100 MB" in printed


def test_the_page_has_the_recorded_figures() -> None:
    page = Path("docs/performance.md").read_text()
    document = json.loads(serving.RECORD.read_text())
    assert with_section(page, serving.markdown(document), serving.BEGIN, serving.END) == page
    ours = document["rows"][BYTES]["16"]["rate"]
    assert f"| {ours:,.0f} | " in page


def test_a_run_is_written_into_the_page_and_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads(serving.RECORD.read_text())
    document["rows"][BYTES]["16"]["rate"] = 4321.0
    monkeypatch.setattr(serving, "run", lambda *_: document)
    monkeypatch.setattr(serving, "RECORD", tmp_path / "record.json")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{serving.BEGIN}old\n{serving.END}\nafter\n")
    assert CliRunner().invoke(serving.main, ["--write", str(page)]).exit_code == 0
    assert "| 4,321 | " in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert json.loads((tmp_path / "record.json").read_text()) == document


# What is sent, and how the answers are read


def test_every_form_of_body_contains_the_image() -> None:
    assert json.loads(plain_json(IMAGE)) == {"pixels": IMAGE.tolist()}
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(IMAGE)))), IMAGE)
    (tensor,) = json.loads(open_inference_json(IMAGE))["inputs"]
    assert tensor == {
        "name": "pixels",
        "shape": [1, 1, 28, 28],
        "datatype": "UINT8",
        "data": IMAGE.ravel().tolist(),
    }
    head = json.loads(binary_head())
    assert head["inputs"][0]["parameters"] == {"binary_data_size": 784}
    assert head["outputs"] == [{"name": "probabilities", "parameters": {"binary_data": True}}]


def test_answers_name_the_most_probable_class() -> None:
    probabilities = [0.1, 0.05, 0.6, *[0.05] * 5, 0.0, 0.0]
    document = {"outputs": [{"data": probabilities}]}
    assert open_inference_class(httpx.Response(200, json=document)) == 2
    head = json.dumps({"outputs": []}).encode()
    binary = np.array(probabilities, "<f4").tobytes()
    answer = httpx.Response(
        200,
        content=head + binary,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert binary_class(answer) == 2


@pytest.mark.parametrize(
    ("status", "answers", "fails"),
    [(200, [4, 7], False), (200, [4, 8], True), (200, [5, 7], True), (500, [4, 7], True)],
)
def test_a_row_with_wrong_answers_is_refused(
    status: int, answers: list[int], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def post(url: str, *, content: bytes, headers: dict[str, str]) -> httpx.Response:
        sent.append((url, content, headers))
        request = httpx.Request("POST", url)
        return httpx.Response(status, json=answers[len(sent) - 1], request=request)

    monkeypatch.setattr(httpx, "post", post)
    requests = Requests("/predict", {"A": "b"}, [b"first", b"second", b"unchecked"])
    row = Row("ours", SERVER, requests, lambda answer: int(answer.json()))
    if fails:
        with pytest.raises(BenchmarkError, match=f"ours answered {status}: "):
            row.check([4, 7])
    else:
        row.check([4, 7])
        url = "http://127.0.0.1:8123/predict"
        assert sent == [(url, b"first", {"A": "b"}), (url, b"second", {"A": "b"})]
    replace(row, read=None).check([0, 0])  # the floor answers nothing that could be wrong


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (3, 3, True)),
        (["--quick"], (1, 1, False)),
        (["--rounds", "5", "--seconds", "2", "--no-peers"], (5, 2, False)),
    ],
)
def test_the_options_set_rounds_seconds_and_peers(
    arguments: list[str], expected: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(serving, "run", lambda *what: asked.append(what))
    assert CliRunner().invoke(serving.main, arguments).exit_code == 0
    assert asked == [expected]


def test_an_error_is_printed_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BenchmarkError("wrk is needed")

    monkeypatch.setattr(serving, "run", fail)
    result = CliRunner().invoke(serving.main, [])
    assert result.exit_code == 1
    assert result.output == "Error: wrk is needed\n"


def test_our_rows_send_every_image_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "get", lambda url: httpx.Response(200 if "/v2" in url else 404))
    images: NDArray[np.uint8] = np.stack([IMAGE, 255 - IMAGE])
    made = serving.our_rows(SERVER, images)
    assert list(made) == [BYTES, JSON, PNG, "OIP JSON", "OIP binary", BATCHES]
    assert made[BYTES].requests.bodies == [image.tobytes() for image in images]
    assert made["OIP binary"].requests.bodies[1] == binary_head() + images[1].tobytes()
    assert made[BATCHES].requests.bodies[1] == binary_head(256) + images[1:].tobytes()
    for name, head in (("OIP binary", binary_head()), (BATCHES, binary_head(256))):
        length = made[name].requests.headers["Inference-Header-Content-Length"]
        assert int(length) == len(head)
    assert {row.requests.path for row in made.values()} == {"/predict", "/v2/models/bn-lenet/infer"}
    read = made[JSON].read
    assert read
    assert read(httpx.Response(200, json={"class_id": 3})) == 3


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="read from /proc")
def test_the_machine_is_described() -> None:
    found = serving.machine(Cores(0, 1), 0.26)
    assert found["load average"] == "0.3"
    assert "server 0, load 1" in found["cores"]
    assert found["numpy"] == np.__version__
