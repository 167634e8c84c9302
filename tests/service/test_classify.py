"""`classify` prints the model's answer for every picture, or says why there is none."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from service.__main__ import main
from service.pictures.decoding import FORMATS, SUFFIXES
from tests.contract.conftest import ROOT, serving
from tests.service.conftest import CLASSES
from training.dataset import FashionMNIST

KEY = "opensesame"
INTERRUPTED = """
import signal
import service.classify as module
def local(*arguments, local=module.local):
    once = iter([local(*arguments)])
    return lambda data: next(once, lambda _: signal.raise_signal(signal.SIGINT))(data)
module.local = local
"""  # it stops at the second picture
PROGRAM = "from service.__main__ import main; main(prog_name='python -m service')"


def classify(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(main, ["classify", *map(str, arguments)], input=stdin)


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(autouse=True)
def model(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNLENET_MODEL_PATH", str(artefact))


@pytest.fixture
def pixels(fashion_mnist: FashionMNIST) -> NDArray[np.uint8]:
    """Return real test images, uint8 [6, 28, 28]."""
    return fashion_mnist.test.images[:6]


@pytest.fixture
def photos(pixels: NDArray[np.uint8], tmp_path: Path) -> list[Path]:
    """Save the images as PNGs that the model sees unchanged."""
    paths = [tmp_path / f"{i}.png" for i in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture(scope="module")
def service(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a real server that needs a key."""
    log = tmp_path_factory.mktemp("service") / "log"
    with serving(log, model_path=artefact, api_key=KEY) as (url, _):
        yield url


@contextmanager
def stranger(status: int, body: bytes, **headers: str) -> Iterator[tuple[str, list[Any]]]:
    """Run another server; give its URL and the headers that it receives."""
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.headers["path"] = self.path
            got.append(self.headers)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815 - what a redirected POST becomes; the base class's spelling

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", got
        finally:
            server.shutdown()
            thread.join()


class TestAnswers:
    def test_are_those_of_the_network_in_float64(
        self,
        photos: list[Path],
        pixels: NDArray[np.uint8],
        reference: Callable[[NDArray[np.uint8]], NDArray[np.float64]],
    ) -> None:
        result = classify("--json", "--top-k", 10, *photos)
        assert result.exit_code == 0
        answers = lines(result)
        assert [answer["file"] for answer in answers] == list(map(str, photos))
        for answer, expected in zip(answers, reference(pixels[:, None]), strict=True):
            given = np.empty(10)
            for each in answer["predictions"]:
                given[each["class_id"]] = each["probability"]
            np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)
            assert answer["label"] == CLASSES[expected.argmax()]
            assert answer["preprocessing"] == "none"

    def test_are_columns_without_a_terminal(self, photos: list[Path]) -> None:
        answers = lines(classify("--json", "--top-k", 3, *photos))
        rows = [row.split("\t") for row in classify("--top-k", 3, *photos).stdout.splitlines()]
        assert rows == [
            [answer["file"], each["label"], f"{each['probability']:.4f}"]
            for answer in answers
            for each in answer["predictions"]
        ]
        best = [row.split("\t")[1] for row in classify(*photos).stdout.splitlines()]
        assert best == [answer["label"] for answer in answers]

    def test_are_the_same_from_standard_input(self, photos: list[Path]) -> None:
        (from_file,) = lines(classify("--json", photos[0]))
        (from_stdin,) = lines(classify("--json", "-", stdin=photos[0].read_bytes()))
        assert from_stdin == {**from_file, "file": "-"}

    def test_use_the_preprocessing_option(self, photos: list[Path]) -> None:
        (converted,) = lines(classify("--json", "--preprocessing", "dataset", photos[0]))
        assert converted["preprocessing"] == "dataset"

    def test_have_the_files_name_made_safe_to_print(
        self, photos: list[Path], tmp_path: Path
    ) -> None:
        names = [
            "Screenshot 1.23\u202fPM.png",
            "été 👩\u200d🎤.png",
            "tab\t.png",
            "line\u2028paragraph\u2029.png",
            os.fsdecode(b"\xff.png"),
        ]
        paths = [tmp_path / name for name in names]
        for path in paths:
            path.write_bytes(photos[0].read_bytes())
        assert [answer["file"] for answer in lines(classify("--json", *paths))] == [
            *map(str, paths)
        ]
        shown = [row.split("\t")[0] for row in classify(*paths).stdout.splitlines()]
        mark = "\N{REPLACEMENT CHARACTER}"  # for characters that break columns or are not text
        names[2:] = [f"tab{mark}.png", f"line{mark}paragraph{mark}.png", f"{mark}.png"]
        assert shown == [str(tmp_path / name) for name in names]

    def test_exist_for_pictures_above_the_services_limits(self, tmp_path: Path) -> None:
        """The command delays no other requests, so only the file's size is limited."""
        wide = tmp_path / "wide.png"
        Image.new("L", (8200, 30)).save(wide)
        assert classify("--json", wide).exit_code == 0

    def test_have_the_model_name_from_the_settings(
        self, photos: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BNLENET_MODEL_NAME", "garments")
        assert lines(classify("--json", photos[0]))[0]["model"]["name"] == "garments"

    def test_are_never_the_cpus_if_a_gpu_was_asked_for(
        self, photos: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BNLENET_DEVICE", "cuda")
        monkeypatch.setattr(onnxruntime, "get_available_providers", list)
        result = classify(*photos)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "BNLENET_DEVICE is cuda, but ONNX Runtime got no CUDA device" in result.stderr


class TestFoldersAndPatterns:
    @pytest.fixture
    def folder(self, photos: list[Path], tmp_path: Path) -> Path:
        """Return a folder with two pictures and other files."""
        folder = tmp_path / "shop [1]"
        (folder / "more.png").mkdir(parents=True)
        for name in ("b.PNG", "a.png", ".hidden.png", "more.png/c.png"):
            (folder / name).write_bytes(photos[0].read_bytes())
        (folder / "notes.txt").write_text("no picture")
        return folder

    def names(self, *arguments: object) -> list[str]:
        return [line["file"] for line in lines(classify("--json", *arguments))]

    def test_a_folder_means_the_pictures_in_it_sorted(self, folder: Path) -> None:
        first, second = str(folder / "a.png"), str(folder / "b.PNG")
        assert self.names(folder) == [first, second]
        assert self.names(second, folder, first) == [second, first, second, first]

    def test_every_format_has_its_file_endings(self) -> None:
        endings = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
        rare = {".apng", ".dib", ".jpe", ".avifs"}
        assert endings - rare <= set(SUFFIXES) <= endings | {".heic", ".heif"}

    def test_a_pattern_means_what_it_means_in_a_shell(self, folder: Path, tmp_path: Path) -> None:
        """The folder's name has brackets; it exists, so it is not a pattern."""
        pattern = f"{tmp_path}/shop*/[a-m].png"
        assert self.names(pattern) == [str(folder / "a.png")]
        expected = [*map(str, (folder / "a.png", folder / "b.PNG", folder / "more.png/c.png"))]
        result = classify("--json", f"{tmp_path}/*/*")
        assert [line["file"] for line in lines(result) if "error" not in line] == expected
        assert [line["code"] for line in lines(result) if "error" in line] == [
            "unsupported_media_type"
        ]
        assert self.names(f"{tmp_path}/**/c.png") == [str(folder / "more.png" / "c.png")]

    def test_an_argument_without_pictures_is_an_error(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        result = classify(tmp_path / "empty", tmp_path / "no*", folder / "a.png")
        assert result.exit_code == 1
        assert len(result.stdout.splitlines()) == 1
        first, second = result.stderr.splitlines()
        assert first.startswith(f"Error: {tmp_path}/empty: The folder has no pictures; ")
        assert ".jpg" in first
        assert second == f"Error: {tmp_path}/no*: No file matches this pattern."
        codes = [line["code"] for line in lines(classify("--json", tmp_path / "empty", "no*"))]
        assert codes == ["no_pictures"] * 2

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
    def test_an_unreadable_folder_is_an_error(self, folder: Path) -> None:
        folder.chmod(0)
        (line,) = lines(classify("--json", folder))
        folder.chmod(0o700)
        assert (line["error"], line["code"]) == (
            "The folder cannot be read: Permission denied.",
            "unreadable_file",
        )


class TestFailures:
    @pytest.fixture
    def bad(self, tmp_path: Path) -> dict[str, Path]:
        """Return files that cannot be classified, by the error's code."""
        noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
        (tmp_path / "text.jpg").write_text("no picture")
        return {
            "unreadable_file": tmp_path / "nowhere.png",
            "invalid_input": tmp_path / "cut.png",
            "unsupported_media_type": tmp_path / "text.jpg",
        }

    def test_are_sentences_on_standard_error_and_stop_no_other_file(
        self, photos: list[Path], bad: dict[str, Path]
    ) -> None:
        result = classify(photos[0], *bad.values(), photos[1])
        assert result.exit_code == 1
        named = [row.split("\t")[0] for row in result.stdout.splitlines()]
        assert named == [str(photos[0]), str(photos[1])]
        sentences = result.stderr.splitlines()
        for path, sentence in zip(bad.values(), sentences, strict=True):
            assert sentence.startswith(f"Error: {path}: ")
            assert sentence.endswith(".")
        assert "No such file" in sentences[0]

    def test_are_lines_of_json_when_asked(self, photos: list[Path], bad: dict[str, Path]) -> None:
        result = classify("--json", *bad.values(), photos[0])
        assert result.exit_code == 1
        assert result.stderr == ""
        *errors, good = lines(result)
        assert [(error["file"], error["code"]) for error in errors] == [
            (str(path), code) for code, path in bad.items()
        ]
        assert all(error.keys() == {"file", "error", "code"} for error in errors)
        assert good["file"] == str(photos[0])

    def test_of_an_endless_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("service.classify.MAX_BYTES", 10**5)
        (error,) = lines(classify("--json", "/dev/zero"))
        assert error["code"] == "payload_too_large"

    def test_begin_with_one_byte_too_many(
        self, photos: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = photos[0].stat().st_size
        monkeypatch.setattr("service.classify.MAX_BYTES", size)
        assert classify(photos[0]).exit_code == 0
        monkeypatch.setattr("service.classify.MAX_BYTES", size - 1)
        (error,) = lines(classify("--json", photos[0]))
        assert error["code"] == "payload_too_large"
        assert error["error"] == f"The file has more than {size - 1:,} bytes."

    def test_name_the_file_and_not_a_body(self, bad: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "empty.png").touch()
        files = (tmp_path / "empty.png", *bad.values())
        sentences = [error["error"] for error in lines(classify("--json", *files))]
        assert sentences[:2] == [
            "The file is empty.",
            "The file cannot be read: No such file or directory.",
        ]
        assert not any("body" in sentence for sentence in sentences)
        assert lines(classify("--json", "-"))[0]["error"] == "The file is empty."

    def test_of_the_model_are_printed_once(
        self, photos: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BNLENET_MODEL_PATH", "nowhere.onnx")
        result = classify(*photos)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.count("Error: The model file nowhere.onnx cannot be read") == 1


class TestRunningService:
    def test_answers_what_this_process_does(
        self, service: str, photos: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BNLENET_API_KEY", KEY)
        arguments = ("--json", "--top-k", 4, "--preprocessing", "none", *photos)
        here = classify(*arguments)
        monkeypatch.setenv("BNLENET_MODEL_PATH", "nowhere.onnx")  # the service has its own
        there = classify("--url", f"{service}/", *arguments)
        assert there.exit_code == 0
        assert lines(there) == lines(here)

    def test_refuses_in_its_own_words(
        self, service: str, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = tmp_path / "text.png"
        text.write_text("no picture")
        result = classify("--url", service, "--json", photos[0])
        assert result.exit_code == 1
        assert lines(result)[0]["code"] == "unauthorized"
        monkeypatch.setenv("BNLENET_API_KEY", KEY)
        assert lines(classify("--url", service, "--json", text)) == lines(classify("--json", text))

    def test_may_take_less_than_a_file_has(
        self, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BNLENET_API_KEY", KEY)
        large = tmp_path / "large.png"
        large.write_bytes(bytes(11 * 2**20))
        (error,) = lines(classify("--url", service, "--json", large))
        assert error["code"] == "payload_too_large"
        assert error["error"].startswith("The file is too large")

    def test_that_does_not_answer_is_named(self, photos: list[Path]) -> None:
        result = classify("--url", "http://127.0.0.1:1", *photos[:2])
        assert result.exit_code == 1
        message = "The service at http://127.0.0.1:1 cannot be reached: Connection refused."
        assert result.stderr.splitlines() == [f"Error: {path}: {message}" for path in photos[:2]]

    @pytest.mark.parametrize(
        ("status", "body", "sentence"),
        [
            (200, b"<html>", "is not this service."),
            (200, b"[]", "is not this service."),
            (200, b'{"predictions": [[0.1, 0.9]]}', "is not this service."),
            (200, b'{"predictions": [{"label": "cat"}]}', "is not this service."),
            (200, b'{"predictions": [{"label": 1, "probability": 0.5}]}', "is not this service."),
            (200, b'{"predictions": [{"label": "cat", "probability": "1"}]}', "not this service."),
            (500, b'["error"]', "The answer was 500 Internal Server Error."),
            (500, b'{"error": 1, "code": "x"}', "The answer was 500 Internal Server Error."),
            (502, b"<html>", "The answer was 502 Bad Gateway."),
            (500, b'{"error": "Sorry."}', "The answer was 500 Internal Server Error."),
        ],
    )
    def test_may_be_something_else(
        self, photos: list[Path], status: int, body: bytes, sentence: str
    ) -> None:
        with stranger(status, body) as (url, _):
            result = classify("--url", url, photos[0])
        assert result.exit_code == 1
        assert result.stderr.endswith(f"{sentence}\n")

    def test_is_sent_the_bytes_as_a_picture_with_what_is_asked(self, photos: list[Path]) -> None:
        with stranger(200, b"{}") as (url, got):
            classify("--url", f"{url}/", "--top-k", 4, "--preprocessing", "dataset", photos[0])
        assert got[0]["Content-Type"] == "image/unknown"
        assert got[0]["Content-Length"] == str(photos[0].stat().st_size)
        assert got[0]["path"] == "/predict?top_k=4&preprocessing=dataset"
        assert "Authorization" not in got[0]

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize(("answer", "reason"), [(b"", "timed out"), (b"what?\r\n", "what?")])
    def test_may_fall_silent_or_speak_no_http(
        self, answer: bytes, reason: str, photos: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.classify.TIMEOUT_SECONDS", 0.5)
        with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as stack:

            def accept() -> None:
                connection = stack.enter_context(server.accept()[0])
                connection.sendall(answer)

            thread = threading.Thread(target=accept)
            thread.start()
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            (error,) = lines(classify("--url", url, "--json", photos[0]))
            thread.join()
        assert error["code"] == "unreachable"
        assert error["error"].startswith(f"The service at {url} cannot be reached: {reason}")

    def test_may_send_elsewhere_but_the_key_stays(
        self, photos: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BNLENET_API_KEY", KEY)
        with (
            stranger(200, b"{}") as (elsewhere, got_there),
            stranger(302, b"", Location=elsewhere) as (url, got_first),
        ):
            classify("--url", url, photos[0])
        assert got_first[0]["Authorization"] == f"Bearer {KEY}"
        assert "Authorization" not in got_there[0]

    def test_may_have_a_key_of_any_letters(
        self, artefact: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BNLENET_API_KEY", "clé €")
        settings = {"model_path": artefact, "api_key": "clé €"}
        with serving(tmp_path / "log", **settings) as (url, _):
            assert classify("--url", url, photos[0]).exit_code == 0

    @pytest.mark.parametrize(
        ("url", "sentence"),
        [
            ("file:///etc/hostname", "such as http://127.0.0.1:8000"),
            ("http://", "a URL with a host"),
            ("http://a b", "a URL with a host"),
            ("http://[::1", "not a valid URL"),
            ("http://127.0.0.1:http", "not a valid URL"),
        ],
    )
    def test_is_at_an_address_of_http(self, photos: list[Path], url: str, sentence: str) -> None:
        result = classify("--url", url, photos[0])
        assert result.exit_code == 2
        assert sentence in result.stderr

    def test_of_no_possible_host_cannot_be_reached(self, photos: list[Path]) -> None:
        result = classify("--url", "http://a..b", photos[0])
        assert result.exit_code == 1
        assert "http://a..b cannot be reached" in result.stderr


def in_terminal(
    arguments: Sequence[object], *, code: str = PROGRAM, stdout_too: bool = True, **variables: str
) -> tuple[str, str]:
    """Run the command with a terminal; return what the terminal got, and the other stdout."""
    ours, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "classify", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"} | variables,
        stdin=subprocess.DEVNULL,
        stdout=terminal if stdout_too else subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    printed = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux's way to say that nobody has the terminal any more
            break
        if not piece:
            break
        printed += piece
    os.close(ours)
    other = process.communicate()[0] or b""
    return printed.decode(), other.decode()


class TestTerminal:
    def test_gets_a_table_with_bars(
        self, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sly = tmp_path / "\x1b]0;sly\x07[red].png"
        sly.write_bytes(photos[0].read_bytes())
        answers = lines(classify("--json", *photos[:2]))
        monkeypatch.chdir(tmp_path)  # short names, so that no row breaks
        printed, _ = in_terminal([photo.relative_to(tmp_path) for photo in (*photos[:2], sly)])
        header, first, second, *_ = printed.splitlines()
        assert ["File" in header, "Label" in header, "Confidence" in header] == [True] * 3
        for row, photo, answer in zip((first, second), photos, answers, strict=False):
            assert photo.name in row
            assert answer["label"] in row
            assert f"{answer['confidence']:.1%}" in row
            # A bar has 24 places, and its end is rounded to an eighth of one.
            assert abs(row.count("█") - 24 * answer["confidence"]) <= 1
        assert "\x1b]0;" not in printed
        assert "sly\N{REPLACEMENT CHARACTER}[red].png" in printed

    def test_that_is_narrow_gets_all_but_some_of_the_bar(
        self, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = "a-name-whose-end-tells-it-from-the-next.png"
        (tmp_path / name).write_bytes(photos[0].read_bytes())
        (answer,) = lines(classify("--json", photos[0]))
        monkeypatch.chdir(tmp_path)
        printed, _ = in_terminal([name], COLUMNS="40")
        header, row, *rest = printed.splitlines()
        assert "Confidence" in header
        assert f"{answer['label']}  " in row
        assert f"{answer['confidence']:.1%}" in row
        assert "█" in row
        assert "".join([row.split()[0], *(part.strip() for part in rest)]) == name

    def test_without_letters_for_bars_gets_the_figures(self, photos: list[Path]) -> None:
        (answer,) = lines(classify("--json", photos[0]))
        printed, _ = in_terminal([photos[0]], PYTHONIOENCODING="ascii")
        assert f"{answer['confidence']:.1%}" in printed

    def test_sees_what_was_done_before_it_interrupted(self, photos: list[Path]) -> None:
        (answer,) = lines(classify("--json", photos[0]))
        printed, _ = in_terminal(photos[:2], code=f"{INTERRUPTED}{PROGRAM}")
        assert f"{answer['confidence']:.1%}" in printed
        assert printed.count("%") == 1
        assert "Aborted!" in printed

    def test_sees_a_bar_while_it_takes_long(self, photos: list[Path]) -> None:
        hurried = f"import service.classify as c; c.PROGRESS_AFTER_SECONDS = 0; {PROGRAM}"
        printed, other = in_terminal(["--json", *photos], code=hurried, stdout_too=False)
        assert "Classifying" in printed
        assert "100%" in printed
        assert other == classify("--json", *photos).stdout

    def test_sees_no_bar_among_lines_of_json(self, photos: list[Path]) -> None:
        hurried = f"import service.classify as c; c.PROGRESS_AFTER_SECONDS = 0; {PROGRAM}"
        printed, _ = in_terminal(["--json", *photos[:2]], code=hurried)
        assert [json.loads(line)["file"] for line in printed.splitlines()] == [
            str(photo) for photo in photos[:2]
        ]

    def test_sees_the_notes_beside_the_name(self, tmp_path: Path) -> None:
        """Of a picture in which nothing stands out from its background."""
        Image.new("RGB", (60, 60), "white").save(tmp_path / "blank.png")
        (answer,) = lines(classify("--json", tmp_path / "blank.png"))
        assert answer["notes"]
        printed, _ = in_terminal(["--top-k", 2, tmp_path / "blank.png"], COLUMNS="200")
        assert f"perhaps {answer['label']} " in printed
        assert printed.count("perhaps") == 1
        rows = [row.split() for row in printed.splitlines()]
        shown = " ".join(" ".join(row) for row in rows)
        for note in answer["notes"]:
            assert note.split()[0] in shown
        assert printed.count("%") == 2

    def test_sees_none_when_it_does_not(self, photos: list[Path]) -> None:
        printed, other = in_terminal(["--json", *photos[:2]], stdout_too=False)
        assert printed == ""
        assert len(other.splitlines()) == 2


def test_damaged_exif_prints_no_warning(photos: list[Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jpg"
    Image.open(photos[0]).save(damaged, exif=b"Exif\0\0MM\0*rubbish")
    done = subprocess.run(
        [sys.executable, "-m", "service", "classify", damaged], capture_output=True, check=True
    )
    assert done.stderr == b""
    assert done.stdout.count(b"\n") == 1


def test_serving_does_not_import_what_classify_needs() -> None:
    code = (
        "import sys, service.__main__;"
        "print(*{'rich', 'numpy', 'PIL', 'urllib.request', 'service.classify'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
