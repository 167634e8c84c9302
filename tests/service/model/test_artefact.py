"""A model file is either as exported, or it is refused with one sentence."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import onnx
import pytest

from service.model.artefact import MAX_BYTES, ModelError, check_artefact, read_artefact
from service.model.classifier import Classifier
from tests.service.conftest import CLASSES, seal
from tests.service.model.mutations import (
    CHANGED_MEANING,
    CHANGED_SELF_TEST,
    CHANGED_WEIGHTS,
    Change,
    damaged,
    outcome,
    probe,
    sealed,
    set_entry,
)
from training.export import NO_DIGEST, build_model, with_digest
from training.folding import fold_batch_norm
from training.model import BNLeNet

COMMITTED = Path(__file__).parents[3] / "models" / "bn_lenet.onnx"


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_artefact(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert str(path) in sentence
    return sentence


def test_it_reads_the_file(artefact: Path) -> None:
    read = read_artefact(artefact)
    data = artefact.read_bytes()
    assert read.data == data
    assert (read.name, read.version, read.classes) == ("bn-lenet", "1", tuple(CLASSES))
    assert read.revision == hashlib.sha256(data).hexdigest()[:12]
    assert read.metadata == {e.key: e.value for e in onnx.load(artefact).metadata_props}
    assert (len(read.self_test.pixels), len(read.self_test.probabilities)) == (4 * 784, 4)
    assert read.self_test.tolerance == 1e-5


def test_the_committed_file_is_accepted_and_its_name_can_be_replaced() -> None:
    assert read_artefact(COMMITTED).name == "bn-lenet"
    assert read_artefact(COMMITTED, "garments").name == "garments"


def test_an_exported_file_is_accepted() -> None:
    """With any installed version of onnx: the graph is compared field by field."""
    metadata = {**read_artefact(COMMITTED).metadata, "digest": NO_DIGEST}
    model = build_model(fold_batch_norm(BNLeNet().eval()), metadata)
    data = with_digest(model.SerializeToString(deterministic=True))
    assert check_artefact(Path("exported.onnx"), data).metadata.keys() == metadata.keys()


def test_reading_imports_neither_the_runtime_nor_numpy() -> None:
    """The supervisor of several workers reads the file without them."""
    code = (
        "import sys, pathlib, service.model.artefact as a;"
        f"a.read_artefact(pathlib.Path({str(COMMITTED)!r}));"
        "print(sorted({'numpy', 'onnxruntime', 'pydantic', 'fastapi'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


class TestFolder:
    """A folder stands for the one model file in it."""

    def test_its_one_file_is_read(self, artefact: Path, tmp_path: Path) -> None:
        """Mounted as Kubernetes does it: read-only, links into a hidden folder of the same name."""
        mount = tmp_path / "mnt"
        real = mount / "..2026_11_25" / "model.onnx"
        real.parent.mkdir(parents=True)
        real.write_bytes(artefact.read_bytes())
        (mount / "..data").symlink_to("..2026_11_25")
        (mount / "model.onnx").symlink_to("..data/model.onnx")
        (mount / "README.md").touch()
        (mount / "old.onnx").mkdir()
        real.chmod(0o444)
        mount.chmod(0o555)
        linked = tmp_path / "models"
        linked.symlink_to(mount)
        try:
            read = read_artefact(linked)
            assert (read.path, read.data) == (linked / "model.onnx", artefact.read_bytes())
            assert Classifier.load(linked).info.revision == read.revision
        finally:
            mount.chmod(0o755)

    def test_none_or_several_are_refused(self, artefact: Path, tmp_path: Path) -> None:
        assert f"The folder {tmp_path} has no .onnx file: leave one there" in refusal(tmp_path)
        for name in ("a.onnx", "b.onnx"):
            (tmp_path / name).write_bytes(artefact.read_bytes())
        assert f"The folder {tmp_path} has 2 .onnx files: leave one there" in refusal(tmp_path)


class TestFile:
    """Anything but a model file is refused, without waiting."""

    def test_missing(self, tmp_path: Path) -> None:
        assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none.onnx")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable(self, artefact: Path, tmp_path: Path) -> None:
        path = tmp_path / "secret.onnx"
        path.write_bytes(artefact.read_bytes())
        path.chmod(0)
        assert "cannot be read (Permission denied)" in refusal(path)

    def test_pipe(self, tmp_path: Path) -> None:
        """Opening a pipe without a writer would block the start for ever."""
        os.mkfifo(tmp_path / "model.onnx")
        assert "is not a regular file" in refusal(tmp_path / "model.onnx")

    def test_too_large(self, tmp_path: Path) -> None:
        path = tmp_path / "large.onnx"
        with path.open("wb") as file:
            file.truncate(2**40)  # a sparse file: more than any memory, but no disk
        assert "has more than 1,048,576 bytes" in refusal(path)
        os.truncate(path, MAX_BYTES)
        assert "does not end with a digest" in refusal(path)

    def test_foreign(self, tmp_path: Path) -> None:
        path = tmp_path / "text.onnx"
        for content in (b"", b"This is no model.", b"\x72\x4a\x0a\x06digest\x12\x40"):
            path.write_bytes(content)
            assert "does not end with a digest" in refusal(path)


def test_the_digest_covers_every_byte(artefact: Path, tmp_path: Path) -> None:
    data = artefact.read_bytes()
    path = tmp_path / "model.onnx"
    places = [*range(0, len(data), 997), *range(len(data) - 80, len(data))]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert "digest" in refusal(path), place
    path.write_bytes(data[:-64] + data[-64:].upper())
    assert "digest" in refusal(path)


@pytest.mark.parametrize("right_digest", [False, True])
@pytest.mark.parametrize("meaning", CHANGED_MEANING)
def test_another_meaning_is_refused_before_the_runtime_opens_it(
    artefact: Path, tmp_path: Path, meaning: str, right_digest: bool
) -> None:
    """ONNX Runtime would load weights from another file, or loop for ever."""
    refusal(write(artefact, tmp_path, CHANGED_MEANING[meaning], right_digest))


@pytest.mark.parametrize("meaning", CHANGED_SELF_TEST)
def test_another_self_test_is_refused(
    artefact: Path, classifier: Classifier, tmp_path: Path, meaning: str
) -> None:
    path = write(artefact, tmp_path, CHANGED_SELF_TEST[meaning], right_digest=True)
    assert outcome(path, classifier, probe()) == "refused"


@pytest.mark.parametrize("meaning", CHANGED_WEIGHTS)
def test_other_weights_are_refused(artefact: Path, tmp_path: Path, meaning: str) -> None:
    """The self-test alone would accept a change of a probability below 1e-5."""
    path = write(artefact, tmp_path, CHANGED_WEIGHTS[meaning], right_digest=False)
    assert "its digest does not match" in refusal(path)


def test_other_class_names_need_the_right_digest(artefact: Path, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        entry = next(e for e in model.metadata_props if e.key == "classes")
        set_entry(model, "classes", entry.value.replace("Sandal", "Sandam"))

    assert "its digest does not match" in refusal(
        write(artefact, tmp_path, rename, right_digest=False)
    )
    path = write(artefact, tmp_path, rename, right_digest=True)
    assert read_artefact(path).classes[5] == "Sandam"


def write(artefact: Path, folder: Path, change: Change, right_digest: bool) -> Path:
    model = onnx.load(artefact)
    digest = model.metadata_props[-1].value
    change(model)
    data = seal(model)
    path = folder / "changed.onnx"
    path.write_bytes(data if right_digest else data[:-64] + digest.encode())
    return path


@pytest.mark.parametrize(("repair", "count"), [(bytes, 400), (sealed, 60)])
def test_damaged_bytes_are_refused_or_change_nothing(
    classifier: Classifier, artefact: Path, tmp_path: Path, repair: type[bytes], count: int
) -> None:
    """With a right digest, other answers are another model; but no file may crash the start."""
    data, images = artefact.read_bytes(), probe()
    path = tmp_path / "model.onnx"
    random = Random(1)  # noqa: S311 - nothing is kept secret with it
    outcomes = set()
    for _ in range(count):
        path.write_bytes(repair(damaged(data, random)))
        outcomes.add(outcome(path, classifier, images))
    allowed = {"refused", "identical"} | ({"other answers"} if repair is sealed else set())
    assert "refused" in outcomes <= allowed
