"""Fashion-MNIST: finds or downloads the four official files, checks their SHA-256, parses them."""

import gzip
import hashlib
import math
import os
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_LISTING = """\
346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073  t10k-images-idx3-ubyte.gz
67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5  t10k-labels-idx1-ubyte.gz
3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84  train-images-idx3-ubyte.gz
a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845  train-labels-idx1-ubyte.gz
"""

DIGESTS = {name: digest for digest, name in map(str.split, _LISTING.splitlines())}
"""SHA-256 of each official file, sorted by name."""

MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)

_TIMEOUT_SECONDS = 30.0
_CHUNK_BYTES = 1 << 16


class DatasetError(Exception):
    """The data set is missing or damaged; the message is one sentence that says what to do."""


class DatasetNotFoundError(DatasetError):
    """No folder was named, the cache has none of the files, and downloading was not allowed."""


@dataclass(frozen=True)
class Split:
    """Images, uint8 [n, 28, 28] with 0 = background, and their labels, uint8 [n] in 0-9."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class FashionMNIST:
    """The whole data set.

    `sha256` identifies all four files: it is the SHA-256 of the output of `sha256sum *.gz`,
    sorted by file name.
    """

    train: Split
    test: Split
    sha256: str


def load(
    data_dir: Path | None = None, *, download: bool = True, mirrors: Sequence[str] = MIRRORS
) -> FashionMNIST:
    """Load Fashion-MNIST: 60,000 training and 10,000 test images.

    The four `.gz` files come from `data_dir`, else from `$FASHION_MNIST_DIR`, else from the
    user's cache folder. Missing and damaged files are downloaded into the cache only: a folder that
    the caller names is never written to, and never replaced by another one.

    Args:
        data_dir: the folder that holds the four files.
        download: whether the network may be used to fill the cache.
        mirrors: base URLs, tried in turn.

    Raises:
        DatasetNotFoundError: no folder is named, the cache is empty, and `download` is false.
        DatasetError: a file is missing, damaged, truncated or swapped, or cannot be downloaded.
    """
    named = data_dir or os.environ.get("FASHION_MNIST_DIR")
    folder = Path(named).expanduser() if named else cache_dir()
    if not named:
        if download:
            _fill(folder, mirrors)
        elif not any((folder / name).exists() for name in DIGESTS):
            raise DatasetNotFoundError(
                f"Fashion-MNIST was not found: set FASHION_MNIST_DIR to the folder of its four "
                f".gz files, put them into {folder}, or allow the download."
            )
    files = {name: _read_checked(folder / name) for name in DIGESTS}
    return FashionMNIST(
        train=_split(files, folder, "train"),
        test=_split(files, folder, "t10k"),
        sha256=hashlib.sha256(_LISTING.encode()).hexdigest(),
    )


def cache_dir() -> Path:
    """Return the user's cache folder for the data set (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bn-lenet" / "fashion-mnist"


def parse_idx(compressed: bytes, path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Parse a gzip-compressed IDX file of unsigned bytes.

    The format (LeCun et al., the MNIST page): two zero bytes, the type 0x08, the number of
    dimensions; their sizes as big-endian 32-bit integers; then the values, row-major.

    Args:
        compressed: the file's bytes.
        path: the file, for the error message.
        dimensions: the number that the file must declare.

    Raises:
        DatasetError: the file is not gzip, has another magic number, or has more or fewer values
            than it declares.
    """
    try:
        data = gzip.decompress(compressed)
    except (OSError, EOFError, zlib.error) as exc:
        raise _damaged(path, f"does not decompress ({exc})") from exc
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 0x08, dimensions])
    if data[:4] != magic or len(data) < header:
        raise _damaged(path, f"does not start with an IDX header of {dimensions} dimension(s)")
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], dtype=">u4"))
    declared, actual = math.prod(shape), len(data) - header
    if actual != declared:
        raise _damaged(path, f"declares {declared:,} values but holds {actual:,}")
    # Copied: a view of immutable bytes is read-only, and torch warns about read-only arrays.
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape).copy()


def _split(files: dict[str, bytes], folder: Path, prefix: str) -> Split:
    images_path = folder / f"{prefix}-images-idx3-ubyte.gz"
    labels_path = folder / f"{prefix}-labels-idx1-ubyte.gz"
    images = parse_idx(files[images_path.name], images_path, dimensions=3)
    labels = parse_idx(files[labels_path.name], labels_path, dimensions=1)
    if images.shape[1:] != (28, 28):
        raise _damaged(images_path, f"holds images of {images.shape[1]} x {images.shape[2]} pixels")
    if len(images) != len(labels):
        raise _damaged(
            labels_path,
            f"holds {len(labels):,} labels for {len(images):,} images of {images_path.name}",
        )
    if labels.size and labels.max() >= len(CLASS_NAMES):
        raise _damaged(labels_path, f"holds the label {labels.max()}; labels are 0 to 9")
    return Split(images, labels)


def _read_checked(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise DatasetError(
            f"{path} is missing: put the four Fashion-MNIST .gz files there, or leave out "
            f"--data-dir and FASHION_MNIST_DIR to download them."
        ) from exc
    except OSError as exc:
        raise DatasetError(f"{path} cannot be read ({exc.strerror}): check the path.") from exc
    digest = hashlib.sha256(data).hexdigest()
    if digest != DIGESTS[path.name]:
        original = next((name for name, known in DIGESTS.items() if known == digest), None)
        if original:
            raise _damaged(path, f"holds the contents of {original}")
        raise _damaged(
            path, f"is not the published file (SHA-256 {digest[:12]}…, {len(data):,} bytes)"
        )
    return data


def _damaged(path: Path, finding: str) -> DatasetError:
    return DatasetError(f"{path} {finding}: delete it and download it again from {MIRRORS[0]}.")


def _fill(folder: Path, mirrors: Sequence[str]) -> None:
    """Download every file that is missing or damaged into `folder`."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        for name, digest in DIGESTS.items():
            path = folder / name
            if not path.is_file() or _sha256(path) != digest:
                _download(path, mirrors, progress)


def _download(path: Path, mirrors: Sequence[str], progress: Progress) -> None:
    """Fetch `path` from the first mirror that has it; continue a broken download."""
    part = path.with_name(path.name + ".part")
    refusals = []
    for mirror in mirrors:
        url = mirror.rstrip("/") + "/" + path.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            resumed = _fetch(url, part, progress)
            if resumed and _sha256(part) != DIGESTS[path.name]:
                part.unlink()
                _fetch(url, part, progress)
            if _sha256(part) == DIGESTS[path.name]:
                part.replace(path)
                return
            part.unlink()
            refusals.append(f"{url} sent a file with another SHA-256")
        except (OSError, HTTPException) as exc:
            refusals.append(f"{url}: {exc}")
    raise DatasetError(
        f"{path.name} could not be downloaded ({'; '.join(refusals)}): try again later, or put "
        f"the four files into {path.parent} by hand."
    )


def _fetch(url: str, part: Path, progress: Progress) -> bool:
    """Append the missing bytes of `url` to `part`; return whether the download was continued."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310 - the URLs are constants, never from a user
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # noqa: S310 - a constant, see above
    except HTTPError as exc:
        exc.close()
        if exc.code == 416 and have:  # `part` is complete already, or too long
            return True
        raise
    with response:
        resumed = bool(response.status == 206)
        if not resumed:
            have = 0  # the mirror ignores ranges and sends the whole file
        length = response.length
        task = progress.add_task(
            part.stem, completed=have, total=None if length is None else have + length
        )
        with part.open("ab" if resumed else "wb") as file:
            # `read1` returns early, so that a broken download keeps all its bytes.
            while chunk := response.read1(_CHUNK_BYTES):
                file.write(chunk)
                progress.advance(task, len(chunk))
    if length is not None and part.stat().st_size < have + length:
        raise OSError(f"the connection closed after {part.stat().st_size:,} bytes")
    return resumed


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
