"""Ten thousand mutated model files: refused with one sentence, or identical answers."""

import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

from benchmarks.reliability.report import Options, Row
from service.model.classifier import Classifier
from tests.service.model.mutations import COMMITTED, files, outcome, probe, sealed

SLOWEST_SECONDS = 10.0


def run(options: Options) -> list[Row]:
    """Load the files as the service does, then again with a correct digest."""
    count = options.count(10_000, 20)
    data, expected, images = COMMITTED.read_bytes(), Classifier.load(COMMITTED), probe()
    found: dict[str, Counter[str]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for name, finish in (("damaged", bytes), ("resealed", sealed)):
            found[name] = Counter()
            for mutant in files(data, count, seed=0):
                path.write_bytes(finish(mutant))
                begin = perf_counter()
                found[name][outcome(path, expected, images)] += 1
                slowest = max(slowest, perf_counter() - begin)
    damaged, resealed = found["damaged"], found["resealed"]
    crashed = sum(kinds["traceback"] + kinds["no sentence"] for kinds in found.values())
    return [
        Row(
            "damaged files: refused; identical answers",
            f"{damaged['refused']:,}; {damaged['identical']:,}",
        ),
        Row.at_most("damaged files: other answers", damaged["other answers"], 0),
        Row.at_most("files refused without one clear sentence", crashed, 0),
        Row.at_most("slowest file", slowest, SLOWEST_SECONDS, " s"),
        Row(
            "the same files with a correct digest, as an attacker can make: other answers",
            f"{resealed['other answers']:,} of {resealed.total():,}",
        ),
    ]
