"""Changes to a model file, as a disk, a network or a person may make them.

`python -m tests.service.model.mutations 10000` makes so many changes to the committed model, and as
many with a corrected digest, and prints how many files are refused.
"""

import hashlib
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.model.artefact import ModelError
from service.model.classifier import Classifier

Change = Callable[[onnx.ModelProto], object]
COMMITTED = Path(__file__).parents[3] / "models" / "bn_lenet.onnx"


def sealed(data: bytes) -> bytes:
    """Correct the digest at the end of a file, as an attacker would."""
    return data[:-64] + hashlib.sha256(data[:-64] + b"0" * 64).hexdigest().encode()


def damaged(data: bytes, random: Random) -> bytes:
    """Change some bytes: in the weights, which are most of the file, or around them."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        size = len(changed)
        first, last = random.choice(((0, size), (0, 1500), (max(0, size - 6500), size)))
        start = random.randrange(first, max(first + 1, min(last, size)))
        length = random.choice((1, 1, 2, 8, 64))
        match random.randrange(6):
            case 0:
                changed[start : start + 1] = bytes([data[start] ^ 1 << random.randrange(8)])
            case 1:
                changed[start : start + length] = random.randbytes(length)
            case 2:
                changed[start:start] = random.randbytes(length)
            case 3:
                del changed[start : start + length]
            case 4:
                changed[start:start] = changed[start : start + length]
            case 5:
                changed[start : start + 1] = bytes([random.choice((0, 0x7F, 0x80, 0xFF))])
    if random.randrange(10) == 0:
        del changed[random.randrange(len(changed)) :]
    return bytes(changed)


def weights(model: onnx.ModelProto, name: str) -> TensorProto:
    """Return the weights of a name."""
    tensor: TensorProto
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    return tensor


def _replace(tensor: TensorProto, values: NDArray[np.generic]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _scale(factor: float) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            _replace(tensor, (numpy_helper.to_array(tensor) * factor).astype(np.float32))

    return change


def _swap_rows(model: onnx.ModelProto) -> None:
    for tensor in (weights(model, "linear3.weight"), weights(model, "linear3.bias")):
        _replace(tensor, numpy_helper.to_array(tensor)[[0, 1, 2, 3, 4, 5, 6, 7, 9, 8]])


def set_entry(model: onnx.ModelProto, key: str, value: str) -> None:
    """Set a metadata entry."""
    next(entry for entry in model.metadata_props if entry.key == key).value = value


def _set_self_test(**changes: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == "self_test")
        entry.value = json.dumps({**json.loads(entry.value), **changes})

    return change


def _self_test_rows(row: list[object]) -> Change:
    """Expect the same row of probabilities for each image."""

    def change(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == "self_test")
        count = len(json.loads(entry.value)["probabilities"])
        _set_self_test(probabilities=[row] * count)(model)

    return change


def _classes(rename: Callable[[list[str]], object]) -> Change:
    def change(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == "classes")
        entry.value = json.dumps(rename(json.loads(entry.value)))

    return change


def _entry(key: str, value: str) -> Change:
    return lambda model: set_entry(model, key, value)


def _external(model: onnx.ModelProto) -> None:
    """Move the weights to another file, which ONNX Runtime would read."""
    tensor = weights(model, "linear1.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def _loop(model: onnx.ModelProto) -> None:
    """Compute a scale in 2**62 rounds of a loop."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, []),
        ],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**62), "rounds"))
    loop = helper.make_node("Loop", ["rounds", "", "white"], ["looped"], body=body)
    model.graph.node.insert(0, loop)
    model.graph.node[2].input[1] = "looped"


def _function(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Sigmoid", ["x"], ["y"])]
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("own", "Sigmoid", ["x"], ["y"], nodes, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    next(node for node in model.graph.node if node.op_type == "Sigmoid").domain = "own"


def _node(operator: str, change: Callable[[onnx.NodeProto], object]) -> Change:
    return lambda model: change(next(n for n in model.graph.node if n.op_type == operator))


def _attribute(operator: str, **attributes: object) -> Change:
    def change(node: onnx.NodeProto) -> None:
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(*item) for item in attributes.items())

    return _node(operator, change)


def _more_nodes(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "almost"
    model.graph.node.append(helper.make_node("Sigmoid", ["almost"], ["probabilities"]))


def _same_output(model: onnx.ModelProto) -> None:
    first, second, third = model.graph.node[2:5]
    second.output[0] = third.input[0] = first.output[0]


CHANGED_WEIGHTS: dict[str, Change] = {
    "weights scaled by 1 + 1e-6": _scale(1 + 1e-6),
    "weights scaled by 1.01": _scale(1.01),
    "weights negative": _scale(-1),
    "weights not numbers": _scale(np.nan),
    "two classes' weights swapped": _swap_rows,
    "one bias one bit off": lambda model: _replace(
        weights(model, "conv1.bias"),
        np.nextafter(numpy_helper.to_array(weights(model, "conv1.bias")), np.float32(np.inf)),
    ),
}
"""With a right digest, some of these are valid models."""

CHANGED_SELF_TEST: dict[str, Change] = {
    "self-test that expects something else": _self_test_rows([0.1] * 10),
    "self-test that expects no number": _self_test_rows([float("nan")] * 10),
}
"""Refused when the self-test is run."""

CHANGED_MEANING: dict[str, Change] = {
    "a class twice": _classes(lambda names: [*names[:9], names[0]]),
    "nine classes": _classes(lambda names: names[:9]),
    "eleven classes": _classes(lambda names: [*names, "Hat"]),
    "a class without a name": _classes(lambda names: [*names[:9], ""]),
    "a class that is half a surrogate pair": _classes(lambda names: [*names[:9], "\ud800"]),
    "a class with a line break": _classes(lambda names: [*names[:9], "Ankle\nboot"]),
    "a class that turns the writing around": _classes(lambda names: [*names[:9], "\u202eBoot"]),
    "a class of a thousand letters": _classes(lambda names: [*names[:9], "x" * 1000]),
    "classes no strings": _classes(lambda names: [[name] for name in names]),
    "classes in an object": _classes(dict.fromkeys),
    "classes a string": _classes(lambda _: "abcdefghij"),
    "classes no JSON": _entry("classes", "Shirt, Bag"),
    "classes nested too deep": _entry("classes", "[" * 100_000),
    "name with a slash": _entry("name", "bn/lenet"),
    "name that a path changes": _entry("name", ".."),
    "name of another route": _entry("name", "stats"),
    "name empty": _entry("name", ""),
    "version with a space": _entry("version", "1 2"),
    "version with a space that is none": _entry("version", "1\N{NO-BREAK SPACE}"),
    "self-test no JSON": _entry("self_test", "yes"),
    "self-test a list": _entry("self_test", "[]"),
    "self-test of a large number": _entry("self_test", "9" * 10_000),
    "self-test without images": _set_self_test(pixels="", probabilities=[]),
    "self-test of other images": _set_self_test(pixels="AAAA"),
    "self-test of one row": _set_self_test(probabilities=[[0.1] * 10]),
    "self-test no base64": _set_self_test(pixels="\N{SNOWMAN}" * 4),
    "self-test of nine classes": _self_test_rows([0.1] * 9),
    "self-test of words": _self_test_rows(["0.1"] * 10),
    "self-test with a tolerance that proves nothing": _set_self_test(tolerance=1.1e-5),
    "self-test with an endless tolerance": _set_self_test(tolerance=float("inf")),
    "self-test with no number for a tolerance": _set_self_test(tolerance=float("nan")),
    "self-test with a negative tolerance": _set_self_test(tolerance=-1e-5),
    "self-test with true for a tolerance": _set_self_test(tolerance=True),
    "self-test without tolerance": _set_self_test(tolerance=None),
    "an entry twice": lambda model: model.metadata_props.add(key="name", value="bn-lenet"),
    "an entry without a key": lambda model: model.metadata_props.add(value="bn-lenet"),
    "an entry without a value": lambda model: model.metadata_props.add(key="more"),
    **{
        f"no {key}": lambda model, key=key: model.metadata_props.remove(  # type: ignore[misc] # mypy knows no lambda with a default
            next(entry for entry in model.metadata_props if entry.key == key)
        )
        for key in ("name", "version", "classes", "self_test")
    },
    "external weights": _external,
    "a loop of 2**62 rounds": _loop,
    "a function of the file's own": _function,
    "another operator": _node("Sigmoid", lambda node: setattr(node, "op_type", "Tanh")),
    "an operator of another domain": _node(
        "Sigmoid", lambda node: setattr(node, "domain", "com.microsoft")
    ),
    "a node more": _more_nodes,
    "a node less": lambda model: model.graph.node.pop(1),
    "two nodes with one output": _same_output,
    "no node that gives the output": lambda model: model.graph.node[-1].output.__setitem__(0, "x"),
    "no nodes": lambda model: model.graph.ClearField("node"),
    "no graph": lambda model: model.ClearField("graph"),
    "a node that reads itself": _node("Flatten", lambda node: node.input.__setitem__(0, "flatten")),
    "a node that skips another": lambda model: model.graph.node[3].input.__setitem__(0, "scaled"),
    "a node without an output": _node("Sigmoid", lambda node: node.output.pop()),
    "a node with two outputs": _node("Sigmoid", lambda node: node.output.append("more")),
    "pooling in steps of nothing": _attribute("AveragePool", kernel_shape=[2, 2], strides=[0, 0]),
    "pooling of another size": _attribute("AveragePool", kernel_shape=[2**62] * 2, strides=[2, 2]),
    "padding": _attribute("Conv", kernel_shape=[5, 5], pads=[2**31] * 4),
    "softmax over the batch": _attribute("Softmax", axis=0),
    "a transposed layer": _attribute("Gemm", transB=0),
    "input of another name": lambda model: setattr(model.graph.input[0], "name", "image"),
    "a second input": lambda model: model.graph.input.add(name="more"),
    "a second output": lambda model: model.graph.output.add(name="logits"),
    "input of another type": lambda model: setattr(
        model.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT
    ),
    "a fixed batch": lambda model: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1
    ),
    "weights of another shape": lambda model: _replace(
        weights(model, "linear1.weight"), np.zeros((256, 120), np.float32)
    ),
    "weights in float64": lambda model: _replace(
        weights(model, "conv1.bias"), np.zeros(6, np.float64)
    ),
    "weights as integers of the same size": lambda model: setattr(
        weights(model, "conv1.bias"), "data_type", TensorProto.INT32
    ),
    "weights cut short": lambda model: setattr(weights(model, "conv1.bias"), "raw_data", bytes(23)),
    "weights missing": lambda model: model.graph.initializer.pop(),
    "weights of one name": lambda model: setattr(
        model.graph.initializer[2], "name", "conv1.weight"
    ),
    "another opset": lambda model: setattr(model.opset_import[0], "version", 13),
    "another version of the format": lambda model: setattr(model, "ir_version", 9),
    "training steps": lambda model: model.training_info.add(),
    "a doc string": lambda model: setattr(model, "doc_string", "x"),
}
"""Refused whether their digest is right or wrong."""


def outcome(path: Path, expected: Classifier, images: NDArray[np.uint8]) -> str:
    """Load a file as the service does; return `refused`, `identical`, or what is wrong."""
    try:
        loaded = Classifier.load(path)
    except ModelError as error:
        sentence = str(error)
        return "refused" if sentence.endswith(".") and "\n" not in sentence else "no sentence"
    except Exception:  # this is the bug that the test looks for
        traceback.print_exc()
        return "traceback"
    same = np.array_equal(loaded.probabilities(images), expected.probabilities(images))
    return "identical" if same and loaded.info.classes == expected.info.classes else "other answers"


def probe() -> NDArray[np.uint8]:
    """Return images whose answers are compared."""
    return np.random.default_rng(0).integers(0, 256, (32, 1, 28, 28), dtype=np.uint8)


def files(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield a file for each change of meaning, then this number with changed bytes."""
    for change in (CHANGED_WEIGHTS | CHANGED_SELF_TEST | CHANGED_MEANING).values():
        model = onnx.load_from_string(data)
        change(model)
        yield model.SerializeToString(deterministic=True)
    random = Random(seed)  # noqa: S311 - nothing is kept secret with it
    for _ in range(count):
        yield damaged(data, random)


def main() -> None:
    """Print the number of files by outcome."""
    count = int(sys.argv[1])
    data, expected, images = COMMITTED.read_bytes(), Classifier.load(COMMITTED), probe()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for name, finish in (("wrong digest", bytes), ("right digest", sealed)):
            counts: Counter[str] = Counter()
            slowest = 0.0
            for mutant in files(data, count, seed=0):
                path.write_bytes(finish(mutant))
                begin = perf_counter()
                counts[outcome(path, expected, images)] += 1
                slowest = max(slowest, perf_counter() - begin)
            print(f"{name}: {dict(counts)}, slowest {slowest:.2f} s")


if __name__ == "__main__":
    main()
