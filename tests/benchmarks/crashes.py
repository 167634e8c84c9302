"""Stands in for the process that tries inputs; its own file, so that the process starts fast."""

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability.report import Options


def crash_or_hang(_: Options, seed: int, count: int, current: Path, done: Any, *__: object) -> None:
    """Try inputs: the third one ends the process, or hangs."""
    while done.value < count:
        current.write_bytes(b"input %d" % done.value)
        if done.value == 2:
            os.abort() if seed == 0 else time.sleep(60)
        done.value += 1
