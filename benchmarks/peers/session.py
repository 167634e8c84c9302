"""The session every peer runs: our file with our options, so that only the servers differ."""

# mypy: ignore-errors
# (runs in the peers' own environments)

import os

import onnxruntime


def load() -> onnxruntime.InferenceSession:
    """Open the file at BENCH_MODEL with the options of `service/model/classifier.py`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
    )
