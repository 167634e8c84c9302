"""The exported file: its contract, its parity with the unfolded model, and refusals to write it."""

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training import export as export_module
from training import folding
from training.dataset import CLASS_NAMES, FashionMNIST, Split
from training.export import (
    ExportError,
    ExportReport,
    Provenance,
    build_model,
    divide_logits,
    export,
    softmax,
    with_digest,
)
from training.folding import fold_batch_norm
from training.model import BNLeNet, initialise

PROVENANCE = Provenance(
    recipe="chapter",
    seed=3,
    dataset_sha256="d" * 64,
    statistics="population",
    versions={"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"},
)


@pytest.fixture(scope="module")
def fitted(fashion_mnist: FashionMNIST) -> BNLeNet:
    """Fit for two hundred small steps, which is far better than chance."""
    torch.set_num_threads(1)
    model = BNLeNet()
    initialise(model, seed=0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.from_numpy(fashion_mnist.train.images[:6400]).view(200, 32, 1, 28, 28)
    labels = torch.from_numpy(fashion_mnist.train.labels[:6400]).view(200, 32).long()
    for x, y in zip(images, labels, strict=True):
        loss: Tensor = nn.functional.cross_entropy(model(x / 255), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def some(fashion_mnist: FashionMNIST) -> Split:
    """Return enough images for four batches, the last of them smaller."""
    return Split(fashion_mnist.test.images[:350], fashion_mnist.test.labels[:350])


@pytest.fixture(scope="module")
def exported(
    fitted: BNLeNet, fashion_mnist: FashionMNIST, tmp_path_factory: pytest.TempPathFactory
) -> ExportReport:
    """Export with the parity check over all 10,000 real test images."""
    out = tmp_path_factory.mktemp("export") / "of/models/model.onnx"
    return export(fitted, PROVENANCE, fashion_mnist.test, out)


def run(path: Path, images: NDArray[np.uint8], batch: int = 64) -> NDArray[np.float32]:
    """Run the file as a service would: one thread, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate(
        [
            session.run(None, {"pixels": images[start : start + batch, None]})[0]
            for start in range(0, len(images), batch)
        ]
    )


@torch.no_grad()
def float64_logits(model: nn.Module, images: NDArray[np.uint8]) -> Tensor:
    x = torch.from_numpy(images).unsqueeze(1).double() / 255
    logits: Tensor = copy.deepcopy(model).double()(x)
    return logits


def test_the_graph_follows_the_contract(exported: ExportReport) -> None:
    proto = onnx.load(exported.path)
    onnx.checker.check_model(proto, full_check=True)
    assert " ".join(node.op_type for node in proto.graph.node) == (
        "Cast Div Conv Sigmoid AveragePool Conv Sigmoid AveragePool Flatten "
        "Gemm Sigmoid Gemm Sigmoid Gemm Softmax"
    )
    (pixels,), (probabilities,) = proto.graph.input, proto.graph.output
    assert pixels.name == "pixels"
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert probabilities.name == "probabilities"
    assert probabilities.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    shapes = [
        [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (pixels, probabilities)
    ]
    assert shapes == [["batch", 1, 28, 28], ["batch", 10]]
    assert proto.ir_version == 10
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]


def test_the_file_is_small_complete_and_names_nothing_of_this_machine(
    exported: ExportReport,
) -> None:
    data = exported.path.read_bytes()
    assert exported.size_bytes == len(data) < 200_000
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load_from_string(data)
    assert not proto.doc_string
    assert not proto.graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
    assert not any(weights.external_data for weights in proto.graph.initializer)
    assert str(Path(export_module.__file__).parent.parent).encode() not in data


def test_it_does_what_the_unfolded_model_does_on_every_real_test_image(
    exported: ExportReport, fitted: BNLeNet, fashion_mnist: FashionMNIST
) -> None:
    images, labels = fashion_mnist.test.images, fashion_mnist.test.labels
    expected = float64_logits(fitted, images)
    actual = run(exported.path, images)
    best = expected.topk(2).values
    ties = torch.nonzero(best[:, 0] - best[:, 1] < 1e-4).flatten().tolist()
    differing = np.flatnonzero(actual.argmax(1) != expected.argmax(1).numpy()).tolist()
    assert exported.ties == tuple(ties)
    assert exported.disagreements == tuple(differing)
    assert set(differing) <= set(ties)
    assert np.abs(actual - expected.softmax(1).numpy()).max() < 1e-5
    assert exported.test_images == 10_000
    assert exported.test_accuracy == (actual.argmax(1) == labels).mean() > 0.6
    assert 0 < exported.fold_error < 2e-5


def test_the_metadata_follow_the_contract(exported: ExportReport) -> None:
    """Read as the service reads them, through ONNX Runtime."""
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    metadata.pop("digest")  # has a test of its own
    self_test = json.loads(metadata.pop("self_test"))
    assert json.loads(metadata.pop("classes")) == list(CLASS_NAMES)
    assert json.loads(metadata.pop("versions")) == {
        **PROVENANCE.versions,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    assert metadata == {
        "name": "bn-lenet",
        "version": "1",
        "recipe": "chapter",
        "seed": "3",
        "test_accuracy": f"{exported.test_accuracy:.4f}",
        "dataset_sha256": "d" * 64,
        "fold_error": f"{exported.fold_error:.1e}",
        "statistics": "population",
        "temperature": "1.0",
    }
    assert self_test.keys() == {"formula", "pixels", "probabilities", "tolerance"}


def test_the_metadata_say_where_these_weights_come_from(
    fitted: BNLeNet, some: Split, tmp_path: Path
) -> None:
    other = Provenance("mine", 11, "e" * 64, "moving", {"python": "3.14.0"})
    report = export(fitted, other, some, tmp_path / "model.onnx")
    metadata = {prop.key: prop.value for prop in onnx.load(report.path).metadata_props}
    assert [metadata[key] for key in ("recipe", "seed", "dataset_sha256", "statistics")] == [
        "mine",
        "11",
        "e" * 64,
        "moving",
    ]
    assert json.loads(metadata["versions"])["python"] == "3.14.0"
    right = run(report.path, some.images).argmax(1) == some.labels
    assert metadata["test_accuracy"] == f"{right.mean():.4f}"
    assert metadata["fold_error"] == f"{report.fold_error:.1e}"
    assert report.test_images == 350


def test_the_digest_ends_the_file_and_covers_every_other_byte(exported: ExportReport) -> None:
    data = exported.path.read_bytes()
    digest = onnx.load_from_string(data).metadata_props[-1]
    assert digest.key == "digest"
    assert data.endswith(b"\x72\x4a\x0a\x06digest\x12\x40" + digest.value.encode())
    assert hashlib.sha256(data[:-64] + b"0" * 64).hexdigest() == digest.value


def test_a_digest_goes_only_at_the_end() -> None:
    zeros = b"0" * 64
    assert (
        with_digest(b"model" + zeros)
        == b"model" + hashlib.sha256(b"model" + zeros).hexdigest().encode()
    )
    with pytest.raises(ValueError, match="last metadata entry"):
        with_digest(b"model" + zeros + b"more")


def test_the_self_test_follows_its_formula_and_the_unfolded_model(
    exported: ExportReport, fitted: BNLeNet
) -> None:
    proto = onnx.load(exported.path)
    (entry,) = (prop for prop in proto.metadata_props if prop.key == "self_test")
    self_test = json.loads(entry.value)
    assert self_test["formula"] == (
        "pixels[k][i][j] = |(16 i + 4 k j) mod 511 - 255|, k = 0..5, i, j = 0..27"
    )
    pixels = [
        abs((16 * i + 4 * k * j) % 511 - 255)
        for k in range(6)
        for i in range(28)
        for j in range(28)
    ]
    assert list(base64.b64decode(self_test["pixels"])) == pixels
    images = np.array(pixels, np.uint8).reshape(6, 28, 28)
    probabilities = np.array(self_test["probabilities"])
    expected = float64_logits(fitted, images).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-11)
    assert np.array_equal(probabilities, probabilities.round(12))  # the same on every processor
    assert self_test["tolerance"] == 1e-5
    worst = np.abs(run(exported.path, images) - probabilities).max()
    assert worst < 1e-5
    assert exported.self_test_error == pytest.approx(worst, abs=1e-9)


def test_the_self_test_detects_wrong_images(fitted: BNLeNet) -> None:
    """Images upside down, transposed, mirrored or scaled by 256: all are far beyond tolerance."""
    images = export_module.self_test_pixels()
    right = float64_logits(fitted, images).softmax(1)
    for wrong in (images[:, ::-1], images[:, :, ::-1], images.transpose(0, 2, 1), images // 2):
        other = float64_logits(fitted, np.ascontiguousarray(wrong)).softmax(1)
        assert (other - right).abs().max() > 1e-2
    with torch.no_grad():
        scaled: Tensor = fitted(torch.from_numpy(images).unsqueeze(1) / 256).softmax(1)
    assert (scaled - right).abs().max() > 1e-4


def test_one_image_alone_gives_what_it_gives_in_a_batch(
    exported: ExportReport, some: Split
) -> None:
    """To float32's rounding: ONNX Runtime does not promise equal bits for all batch sizes."""
    alone, together = (run(exported.path, some.images, batch) for batch in (1, 64))
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)


def test_the_same_model_gives_the_same_bytes(fitted: BNLeNet, some: Split, tmp_path: Path) -> None:
    first = export(fitted, PROVENANCE, some, tmp_path / "first.onnx")
    second = export(copy.deepcopy(fitted), PROVENANCE, some, tmp_path / "second.onnx")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first == replace(second, path=first.path)


def test_temperature_is_folded_into_the_last_layer(
    fitted: BNLeNet, exported: ExportReport, some: Split, tmp_path: Path
) -> None:
    report = export(fitted, PROVENANCE, some, tmp_path / "cool.onnx", temperature=2.5)
    expected = (float64_logits(fitted, some.images) / 2.5).softmax(1).numpy()
    assert np.abs(run(report.path, some.images) - expected).max() < 1e-5
    assert report.self_test_error < 1e-5
    cool, plain = onnx.load(report.path), onnx.load(exported.path)
    assert {prop.key: prop.value for prop in cool.metadata_props}["temperature"] == "2.5"
    assert cool.graph.node == plain.graph.node
    pairs = zip(cool.graph.initializer, plain.graph.initializer, strict=True)
    changed = {one.name for one, other in pairs if one != other}
    assert changed == {"linear3.weight", "linear3.bias"}


def test_logits_are_divided_in_float64_and_rounded_once() -> None:
    model = fold_batch_norm(BNLeNet().eval())
    before = copy.deepcopy(model.state_dict())
    divided = divide_logits(model, 0.7).state_dict()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        expected = (value.double() / 0.7).float() if name.startswith("linear3.") else value
        assert torch.equal(divided[name], expected)


def test_the_largest_logits_give_finite_probabilities() -> None:
    logits = np.array([[1e4, 0.0, 1e4], [-1e4, -1e4 + np.log(3), -np.inf]])
    np.testing.assert_allclose(softmax(logits), [[0.5, 0, 0.5], [0.25, 0.75, 0]])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(
    temperature: float, fitted: BNLeNet, some: Split, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        export(fitted, PROVENANCE, some, tmp_path / "model.onnx", temperature=temperature)


Parameters = Callable[..., tuple[Tensor, Tensor]]


def unscaled_bias(right: Parameters) -> Parameters:
    def fold(w, b, gamma, beta, mean, var, eps):  # type: ignore[no-untyped-def] # as the original
        return right(w, b, gamma, beta, mean, var, eps)[0], b - mean + beta

    return fold


def swapped_affine(right: Parameters) -> Parameters:
    return lambda w, b, gamma, beta, *rest: right(w, b, beta, gamma, *rest)


def not_a_number(right: Parameters) -> Parameters:
    return lambda w, b, gamma, beta, mean, var, eps: right(w, b, gamma, beta, mean, -var, eps)


@pytest.mark.parametrize("plant", [unscaled_bias, swapped_affine, not_a_number])
def test_a_wrong_fold_is_never_written(
    plant: Callable[[Parameters], Parameters],
    fitted: BNLeNet,
    some: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "model.onnx"
    out.write_bytes(b"the model that is served")
    monkeypatch.setattr(folding, "fold_parameters", plant(folding.fold_parameters))
    with pytest.raises(ExportError, match=r"at most 1e-04 is allowed: nothing was written\.$"):
        export(fitted, PROVENANCE, some, out)
    assert out.read_bytes() == b"the model that is served"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("place", [(0, 0), (349, 9)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_fold_error_is_the_largest_over_all_logits_of_all_images(
    place: tuple[int, int],
    sign: int,
    fitted: BNLeNet,
    some: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One logit is changed, by less than the tolerance and then by more."""
    right, off = export_module._run, 0.0

    def spoiled(proto: onnx.ModelProto, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        outputs = right(proto, images)
        if len(outputs) == 2:
            outputs[1][place] += np.float32(sign * off)
        return outputs

    monkeypatch.setattr(export_module, "_run", spoiled)
    off = 8e-5
    report = export(fitted, PROVENANCE, some, tmp_path / "model.onnx")
    assert report.fold_error == pytest.approx(off, abs=1.5e-5)
    off = 1.2e-4
    with pytest.raises(ExportError, match="at most 1e-04 is allowed"):
        export(fitted, PROVENANCE, some, tmp_path / "other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_with_another_class_is_never_written(
    fitted: BNLeNet, some: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export_module._run

    def rolled(proto: onnx.ModelProto, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        probabilities, *rest = right(proto, images)
        probabilities[7] = np.roll(probabilities[7], 1)
        return [probabilities, *rest]

    monkeypatch.setattr(export_module, "_run", rolled)
    with pytest.raises(ExportError, match=r"classes for 1 test image\(s\), first for image 7:"):
        export(fitted, PROVENANCE, some, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [(0, 0), (5, 9)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_file_that_fails_its_own_self_test_is_never_written(
    place: tuple[int, int],
    sign: int,
    fitted: BNLeNet,
    some: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One probability of one image suffices."""
    right = export_module._run

    def off(proto: onnx.ModelProto, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        probabilities, *rest = right(proto, images)
        if len(images) == 6:
            probabilities[place] += np.float32(sign * 2.5e-5)
        return [probabilities, *rest]

    monkeypatch.setattr(export_module, "_run", off)
    with pytest.raises(
        ExportError, match=r"fails its own self-test \(error 2\.\de-05\): nothing was"
    ):
        export(fitted, PROVENANCE, some, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_ties_are_listed(fitted: BNLeNet, some: Split, tmp_path: Path) -> None:
    """Two classes differ by less in float64 than float32's softmax can show."""
    twins = copy.deepcopy(fitted)
    last = twins.get_submodule("linear3")
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight[1] = last.weight[0]
        last.bias[1] = last.bias[0].nextafter(torch.tensor(torch.inf))
    ones = float64_logits(twins, some.images).argmax(1) == 1
    report = export(twins, PROVENANCE, some, tmp_path / "model.onnx")
    assert report.ties == tuple(torch.nonzero(ones).flatten().tolist())
    assert len(report.ties) > 10
    assert 0 < len(report.disagreements) <= len(report.ties)
    assert set(report.disagreements) <= set(report.ties)


def test_the_model_does_not_change(fitted: BNLeNet, some: Split, tmp_path: Path) -> None:
    before = copy.deepcopy(fitted.state_dict())
    export(fitted, PROVENANCE, some, tmp_path / "model.onnx", temperature=2.0)
    after = fitted.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_training_mode_is_refused(fitted: BNLeNet, some: Split, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training mode"):
        export(copy.deepcopy(fitted).train(), PROVENANCE, some, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(1),
        nn.Conv2d(1, 1, 5, padding=2),
        nn.Conv2d(1, 1, 5, stride=2),
        nn.Conv2d(1, 1, 5, dilation=2),
        nn.Conv2d(2, 2, 5, groups=2),
        nn.AvgPool2d(2, padding=1),
        nn.AvgPool2d(3, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=1),
        nn.Flatten(0),
        nn.Flatten(1, 2),
        nn.ReLU(),
    ],
)
def test_other_kinds_of_layers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"cannot export {type(layer).__name__}"):
        build_model(nn.Sequential(layer), {})


def test_pooling_keeps_its_own_stride(some: Split, tmp_path: Path) -> None:
    network = nn.Sequential(nn.AvgPool2d(3, stride=2), nn.Flatten(), nn.Linear(169, 10)).eval()
    path = tmp_path / "model.onnx"
    path.write_bytes(build_model(network, {}).SerializeToString())
    expected = float64_logits(network, some.images).softmax(1).numpy()
    np.testing.assert_allclose(run(path, some.images), expected, rtol=0, atol=1e-5)


def test_a_full_disk_leaves_the_old_file(
    fitted: BNLeNet, some: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.onnx"
    out.write_bytes(b"the model that is served")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        ExportError, match=r"cannot write .*model\.onnx \(No space left on device\)"
    ):
        export(fitted, PROVENANCE, some, out)
    assert out.read_bytes() == b"the model that is served"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_cannot_be_made_is_an_error(
    fitted: BNLeNet, some: Split, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot write .*file/model\.onnx \("):
        export(fitted, PROVENANCE, some, tmp_path / "file/model.onnx")


def test_building_needs_no_data_set() -> None:
    model = BNLeNet("scratch").eval()
    proto = build_model(fold_batch_norm(model), {"name": "a", "version": "b"})
    assert [(prop.key, prop.value) for prop in proto.metadata_props] == [
        ("name", "a"),
        ("version", "b"),
    ]
