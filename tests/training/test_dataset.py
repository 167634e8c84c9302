"""The data set: the real one, small ones with every kind of damage, and mirrors with faults."""

import gzip
import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from training import dataset
from training.dataset import (
    CLASS_NAMES,
    DIGESTS,
    DatasetError,
    DatasetNotFoundError,
    FashionMNIST,
    cache_dir,
    load,
    parse_idx,
)

Files = dict[str, bytes]
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def idx(values: NDArray[np.uint8]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def zipped(data: bytes) -> bytes:
    """Compress to the same bytes in every process: xdist compares the parameters they are in."""
    return gzip.compress(data, mtime=0)


def packed(values: NDArray[np.uint8]) -> bytes:
    return zipped(idx(values))


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the machine's own data set and proxies from the test."""
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    """Return a small data set with the official names; its digests replace the published ones."""
    random = np.random.default_rng(0)
    made = {}
    for prefix, count in (("train", 30), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        made[f"{prefix}-images-idx3-ubyte.gz"] = packed(images)
        made[f"{prefix}-labels-idx1-ubyte.gz"] = packed(labels)
    publish(made, monkeypatch)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache/bn-lenet/fashion-mnist"


def publish(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in files.items():
        monkeypatch.setitem(DIGESTS, name, hashlib.sha256(data).hexdigest())


def put(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def refusal(folder: Path) -> str:
    """Return the message with which the folder is refused: one sentence."""
    with pytest.raises(DatasetError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# The real data set


def test_the_real_data_set_is_the_published_one(fashion_mnist: FashionMNIST) -> None:
    """The classes are balanced; mean and deviation are the well-known 0.2860 and 0.3530."""
    for split, count in ((fashion_mnist.train, 60_000), (fashion_mnist.test, 10_000)):
        assert split.images.shape == (count, 28, 28)
        assert split.images.dtype == split.labels.dtype == np.uint8
        assert np.bincount(split.labels).tolist() == [count // 10] * 10
    counts = np.bincount(fashion_mnist.train.images.ravel(), minlength=256)
    grey = np.arange(256) / 255
    mean = np.average(grey, weights=counts)
    assert round(mean, 4) == 0.2860
    assert round(np.average((grey - mean) ** 2, weights=counts) ** 0.5, 4) == 0.3530
    first = [CLASS_NAMES[label] for label in fashion_mnist.test.labels[:4]]
    assert first == ["Ankle boot", "Pullover", "Trouser", "Trouser"]


def test_the_digest_is_that_of_sha256sums_listing(fashion_mnist: FashionMNIST) -> None:
    """It is the output of `sha256sum *.gz | sha256sum` in the folder of the official files."""
    expected = "4208722e2f95c92b7e6f0789caf8e8b31dee57cf57b10c3956b314f438b6f3d2"
    assert fashion_mnist.sha256 == expected


def test_the_classes_are_those_of_the_publication() -> None:
    """Xiao, Rasul and Vollgraf, "Fashion-MNIST" (2017), in the order of their labels."""
    assert ", ".join(CLASS_NAMES) == (
        "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
    )


# Where it is looked for


def test_the_cache_is_in_the_home_folder_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_dir() == tmp_path / "cache/bn-lenet/fashion-mnist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache/bn-lenet/fashion-mnist"


def test_a_home_folder_may_be_abbreviated(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(files, tmp_path / "data")
    assert len(load(Path("~/data")).test.labels) == 20


def test_a_cache_that_lacks_some_files_names_the_first(files: Files, cache: Path) -> None:
    put({TRAIN_LABELS: files[TRAIN_LABELS]}, cache)
    with pytest.raises(DatasetError, match=f"{TEST_IMAGES} is missing") as caught:
        load(download=False)
    assert not isinstance(caught.value, DatasetNotFoundError)


def test_a_named_folder_comes_before_the_environment_and_that_before_the_cache(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "argument").mkdir()
    put(files, tmp_path / "environment")
    cache = tmp_path / "cache/bn-lenet/fashion-mnist"
    put(files | {TRAIN_LABELS: b"damaged"}, cache)
    with pytest.raises(DatasetError, match=f"{cache / TRAIN_LABELS} is not the published"):
        load(download=False)
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path / "environment"))
    assert len(load(download=False).train.labels) == 30
    with pytest.raises(DatasetError, match=r"argument/.* is missing"):
        load(tmp_path / "argument", download=False)


def test_a_named_folder_is_never_filled_from_the_network(files: Files, tmp_path: Path) -> None:
    del files[TEST_LABELS]
    folder = put(files, tmp_path / "data")
    with pytest.raises(DatasetError, match=f"{TEST_LABELS} is missing: put the four"):
        load(folder, mirrors=["http://127.0.0.1:1/"])
    assert {path.name for path in folder.iterdir()} == set(files)


def test_a_folder_in_place_of_a_file_is_an_error(files: Files, tmp_path: Path) -> None:
    del files[TEST_LABELS]
    (put(files, tmp_path) / TEST_LABELS).mkdir()
    assert f"{TEST_LABELS} cannot be read (Is a directory)" in refusal(tmp_path)


def test_no_data_and_no_download_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(DatasetNotFoundError, match="set FASHION_MNIST_DIR"):
        load(download=False)


# Damaged files


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_a_flipped_byte_is_found(name: str, files: Files, tmp_path: Path) -> None:
    damaged = bytearray(files[name])
    damaged[len(damaged) // 2] ^= 1
    message = refusal(put(files | {name: bytes(damaged)}, tmp_path))
    assert message.startswith(f"{tmp_path / name} is not the published file")
    assert "delete it and download it again from https://" in message


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_a_truncated_file_is_found(name: str, files: Files, tmp_path: Path) -> None:
    message = refusal(put(files | {name: files[name][:-7]}, tmp_path))
    assert message.startswith(f"{tmp_path / name} is not the published file")
    assert f"{len(files[name]) - 7:,} bytes" in message


@pytest.mark.parametrize(
    ("one", "other"), [(TRAIN_LABELS, TEST_LABELS), (TEST_IMAGES, TEST_LABELS)]
)
def test_swapped_files_are_found(one: str, other: str, files: Files, tmp_path: Path) -> None:
    put(files | {one: files[other], other: files[one]}, tmp_path)
    assert refusal(tmp_path) in {
        f"{tmp_path / a} holds the contents of {b}: delete it and download it again from "
        f"{dataset.MIRRORS[0]}."
        for a, b in ((one, other), (other, one))
    }


@pytest.mark.parametrize(
    ("name", "data", "finding"),
    [
        (TRAIN_IMAGES, b"\x00" * 100, "does not decompress"),
        (TRAIN_IMAGES, zipped(b"")[:10] + b"\xff" * 100, "does not decompress"),
        (TRAIN_IMAGES, packed(np.zeros((30, 28, 28), np.uint8))[:-9], "does not decompress"),
        (TRAIN_IMAGES, packed(np.zeros(30, np.uint8)), "an IDX header of 3 dimension"),
        (TEST_LABELS, packed(np.zeros((20, 28, 28), np.uint8)), "an IDX header of 1 dimension"),
        (TEST_LABELS, zipped(b"\0\0\x0d\1\0\0\0\x01\0\0\0\0"), "an IDX header of 1 dimen"),
        (TEST_LABELS, zipped(b"\0\0\x08\1\0\0"), "an IDX header of 1 dimension"),
        (
            TEST_LABELS,
            zipped(idx(np.zeros(20, np.uint8)) + b"\0"),
            "declares 20 values but holds 21",
        ),
        (
            TEST_IMAGES,
            zipped(b"\0\0\x08\3" + b"\xff" * 12 + b"\0" * 9),
            f"declares {(2**32 - 1) ** 3:,} values but holds 9",
        ),
        (TEST_IMAGES, packed(np.zeros((20, 27, 28), np.uint8)), "images of 27 x 28 pixels"),
        (TEST_LABELS, packed(np.full(20, 10, np.uint8)), "holds the label 10; labels are 0 to 9"),
        (TEST_LABELS, packed(np.zeros(19, np.uint8)), "holds 19 labels for 20 images"),
    ],
)
def test_a_file_with_the_right_digest_is_still_checked(
    name: str,
    data: bytes,
    finding: str,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish({name: data}, monkeypatch)
    message = refusal(put(files | {name: data}, tmp_path))
    assert message.startswith(str(tmp_path / name))
    assert finding in message


def test_every_shortening_of_an_idx_file_is_refused() -> None:
    whole = idx(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))
    assert parse_idx(gzip.compress(whole), Path("x"), 3).tolist() == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9], [10, 11]],
    ]
    assert parse_idx(packed(np.zeros(0, np.uint8)), Path("x"), 1).shape == (0,)
    for length in range(len(whole)):
        with pytest.raises(DatasetError, match=r"^x "):
            parse_idx(gzip.compress(whole[:length]), Path("x"), 3)


# Downloads


@dataclass
class Mirror:
    """A local web server of files, with faults to switch on."""

    files: Files
    url: str = ""
    cut_after: int | None = None  # closes the connection after so many bytes of a body
    knows_ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # file name, Range

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name, wanted = handler.path.removeprefix("/data/"), handler.headers["Range"]
        self.asked.append((name, wanted))
        body = self.files.get(name)
        if body is None:
            handler.send_error(404)
            return
        start = 0
        if wanted and self.knows_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                handler.send_error(416)
                return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        handler.wfile.write(body[start:][: self.cut_after])


@pytest.fixture
def mirrors(files: Files) -> Iterator[list[Mirror]]:
    """Start two mirrors of the small data set."""
    started, servers = [Mirror(dict(files)), Mirror(dict(files))], []
    for mirror in started:

        class Handler(BaseHTTPRequestHandler):
            source = mirror

            def do_GET(self) -> None:
                self.source.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        mirror.url = f"http://127.0.0.1:{server.server_port}/data/"
        servers.append(server)
    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


def fetch(mirrors: list[Mirror]) -> FashionMNIST:
    return load(mirrors=[mirror.url for mirror in mirrors])


def held(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_missing_files_are_downloaded_once(
    mirrors: list[Mirror], files: Files, cache: Path
) -> None:
    assert len(fetch(mirrors).train.labels) == 30
    assert held(cache) == files
    assert len(fetch(mirrors).test.labels) == 20
    assert sorted(mirrors[0].asked) == [(name, None) for name in sorted(files)]
    assert mirrors[1].asked == []


def test_a_mirrors_address_may_end_without_a_slash(
    mirrors: list[Mirror], files: Files, cache: Path
) -> None:
    load(mirrors=[mirrors[0].url.rstrip("/")])
    assert held(cache) == files


def test_a_damaged_file_in_the_cache_is_downloaded_again(
    mirrors: list[Mirror], files: Files, cache: Path
) -> None:
    put(files | {TEST_IMAGES: b"damaged"}, cache)
    fetch(mirrors)
    assert held(cache) == files
    assert mirrors[0].asked == [(TEST_IMAGES, None)]


def test_a_folder_in_place_of_a_file_in_the_cache_is_an_error(
    mirrors: list[Mirror], cache: Path
) -> None:
    (cache / TEST_IMAGES).mkdir(parents=True)
    with pytest.raises(DatasetError, match=rf"{TEST_IMAGES} could not be downloaded .*directory"):
        fetch(mirrors)


def test_a_broken_download_is_continued_from_the_next_mirror(
    mirrors: list[Mirror], files: Files, cache: Path
) -> None:
    mirrors[0].cut_after = 10
    fetch(mirrors)
    assert held(cache) == files
    assert sorted(mirrors[1].asked) == [(name, "bytes=10-") for name in sorted(files)]


def test_a_killed_download_is_continued(mirrors: list[Mirror], files: Files, cache: Path) -> None:
    put(files, cache)
    (cache / TEST_IMAGES).rename(cache / f"{TEST_IMAGES}.part")
    (cache / f"{TEST_IMAGES}.part").write_bytes(files[TEST_IMAGES][:5000])
    fetch(mirrors)
    assert held(cache) == files
    assert mirrors[0].asked == [(TEST_IMAGES, "bytes=5000-")]


def test_a_mirror_without_ranges_sends_the_whole_file(
    mirrors: list[Mirror], files: Files, cache: Path
) -> None:
    mirrors[0].knows_ranges = False
    put({f"{TEST_IMAGES}.part": files[TEST_IMAGES][:5000]}, cache)
    fetch(mirrors)
    assert held(cache) == files
    assert mirrors[1].asked == []


@pytest.mark.parametrize("rest", [b"not the beginning", b"longer than the file" * 2000])
def test_a_wrong_partial_file_is_deleted(
    rest: bytes, mirrors: list[Mirror], files: Files, cache: Path
) -> None:
    put({f"{TEST_IMAGES}.part": rest}, cache)
    fetch(mirrors[:1])
    assert held(cache) == files
    asked = [wanted for name, wanted in mirrors[0].asked if name == TEST_IMAGES]
    assert asked == [f"bytes={len(rest)}-", None]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("begins", [False, True])
def test_a_mirror_that_stops_answering_is_skipped(
    begins: bool,
    mirrors: list[Mirror],
    files: Files,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It accepts the connection and never answers, or stops after the first five bytes."""
    assert 5 <= dataset._TIMEOUT_SECONDS <= 60
    monkeypatch.setattr(dataset, "_TIMEOUT_SECONDS", 0.5)
    put({name: data for name, data in files.items() if name != TEST_LABELS}, cache)
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(files[TEST_LABELS])}\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:

        def accept() -> None:
            connection = stack.enter_context(silent.accept()[0])
            if begins:
                connection.sendall(head + files[TEST_LABELS][:5])

        thread = threading.Thread(target=accept)
        thread.start()
        load(mirrors=[f"http://127.0.0.1:{silent.getsockname()[1]}/", mirrors[0].url])
        thread.join()
    assert held(cache) == files
    assert mirrors[0].asked == [(TEST_LABELS, "bytes=5-" if begins else None)]


def test_a_mirror_that_sends_other_bytes_is_skipped(
    mirrors: list[Mirror], files: Files, cache: Path
) -> None:
    mirrors[0].files[TRAIN_LABELS] = b"<html>Please sign in</html>"
    fetch(mirrors)
    assert held(cache) == files
    assert mirrors[1].asked == [(TRAIN_LABELS, None)]


def test_if_every_mirror_fails_the_error_has_their_reasons(
    mirrors: list[Mirror], cache: Path
) -> None:
    mirrors[0].files.clear()
    mirrors[1].files[TEST_IMAGES] = b"<html>Please sign in</html>"
    with pytest.raises(DatasetError) as caught:
        load(mirrors=[*(mirror.url for mirror in mirrors), "http://127.0.0.1:1/"])
    message = str(caught.value)
    assert message.startswith(f"{TEST_IMAGES} could not be downloaded (")
    assert f"{mirrors[0].url}{TEST_IMAGES}: HTTP Error 404" in message
    assert f"{mirrors[1].url}{TEST_IMAGES} sent a file with another SHA-256" in message
    assert f"http://127.0.0.1:1/{TEST_IMAGES}: " in message
    assert "refused" in message
    assert f"put the four files into {cache} by hand." in message
    assert held(cache) == {}


def test_the_mirrors_are_the_official_ones() -> None:
    """They are the addresses on its authors' page."""
    assert dataset.MIRRORS == (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    )


def test_the_arrays_are_writable(fashion_mnist: FashionMNIST) -> None:
    """PyTorch warns about read-only arrays."""
    for split in (fashion_mnist.train, fashion_mnist.test):
        assert split.images.flags.writeable
        assert split.labels.flags.writeable
