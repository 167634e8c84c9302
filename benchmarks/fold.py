"""What the fold saves: nodes, bytes and microseconds of the committed model, before and after it.

    python -m benchmarks.fold          seconds; prints the table of docs/batch-norm.md

"Before" is the exported graph with each batch norm as a node of its own. The sessions take turns,
and the fastest block of runs counts, because a busy machine can only slow a block down.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from torch import nn

from training.batch_norm import affine, statistics
from training.evaluation.card import table
from training.export import build_model
from training.fitting.run import Run
from training.folding import fold_batch_norm
from training.model import norm_layers
from training.studies.records import conditions

RUN = Path(__file__).parents[1] / "models" / "run"
BLOCKS, RUNS = 60, 50


def unfolded(model: nn.Sequential) -> onnx.ModelProto:
    """Return the graph of a model in which each batch norm is a node after its layer's node."""
    norms = norm_layers(model)
    names = [name for name, _ in model.named_children()]
    after = {names[names.index(norm) - 1]: norm for norm in norms}
    plain = OrderedDict((name, layer) for name, layer in model.named_children())
    for norm in norms:
        del plain[norm]
    proto = build_model(nn.Sequential(plain), {})
    nodes = []
    for node in proto.graph.node:
        nodes.append(node)
        if node.name in after:
            norm = after[node.name]
            layer, output = norms[norm], node.output[0]
            node.output[0] = f"{node.name}.output"
            inputs = [node.output[0]]
            for name, values in zip(
                ("gamma", "beta", "mean", "variance"),
                (*affine(layer), *statistics(layer)),
                strict=True,
            ):
                inputs.append(f"{norm}.{name}")
                array = values.detach().numpy()
                proto.graph.initializer.append(numpy_helper.from_array(array, inputs[-1]))
            nodes.append(
                helper.make_node("BatchNormalization", inputs, [output], norm, epsilon=layer.eps)
            )
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def session(
    proto: onnx.ModelProto, *, optimise: bool, optimised: Path | None = None
) -> onnxruntime.InferenceSession:
    """Return a session on one CPU thread; it writes its own graph into the file `optimised`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # it warns that an optimised graph is for this machine only
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def norms_left(proto: onnx.ModelProto) -> int:
    """Return how many batch norms ONNX Runtime leaves in a graph, with all optimisations."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "optimised.onnx"
        session(proto, optimise=True, optimised=file)
        return Counter(node.op_type for node in onnx.load(file).graph.node)["BatchNormalization"]


def microseconds(
    sessions: Sequence[onnxruntime.InferenceSession], blocks: int, runs: int
) -> list[float]:
    """Return the time of one image in each session: the fastest block, in microseconds."""
    pixels = {"pixels": np.zeros((1, 1, 28, 28), np.uint8)}
    fastest = [float("inf")] * len(sessions)
    for _ in range(blocks):
        for index, each in enumerate(sessions):
            begin = time.perf_counter()
            for _ in range(runs):
                each.run(None, pixels)
            fastest[index] = min(fastest[index], 1e6 * (time.perf_counter() - begin) / runs)
    return fastest


@click.command()
def main() -> None:
    """Print nodes, bytes and microseconds before and after the fold."""
    run = Run(RUN)
    model = run.model(run.config().recipe.statistics)
    graphs = {
        "before the fold": unfolded(model),
        "after the fold": build_model(fold_batch_norm(model), {}),
    }
    sessions = [
        session(graph, optimise=each) for graph in graphs.values() for each in (True, False)
    ]
    times = iter(microseconds(sessions, BLOCKS, RUNS))
    rows = [
        [
            name,
            str(len(graph.graph.node)),
            f"{graph.ByteSize():,}",
            f"{next(times):.1f}",
            f"{next(times):.1f}",
        ]
        for name, graph in graphs.items()
    ]
    heading = ["", "ONNX nodes", "bytes", "µs for one image", "without the runtime's optimisations"]
    click.echo(table(heading, rows))
    left = norms_left(graphs["before the fold"])
    click.echo(f"\nONNX Runtime {onnxruntime.__version__} leaves {left} batch norms unfolded.")
    click.echo(
        f"{conditions()['processor']}, one thread; the fastest of {BLOCKS} blocks of {RUNS} runs."
    )


if __name__ == "__main__":
    main()
