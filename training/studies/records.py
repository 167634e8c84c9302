"""The measurements of a study: JSON lines, written at once, so that a killed study can go on."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from training.atomic import write_whole
from training.fitting.run import RunError


def conditions(**settings: Any) -> dict[str, Any]:
    """Return the conditions that figures depend on: settings, this machine, versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return settings | {
        "processor": names[0] if names else platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def in_words(conditions: dict[str, Any]) -> str:
    """Return machine and versions as a phrase for a page."""
    return (
        "{processor} ({instructions}), {cores} cores, {threads} thread; "
        "Python {python}, torch {torch}".format(**conditions)
    )


class Records:
    """A file of JSON lines: the first has the conditions, every other line a measurement.

    Attributes:
        conditions: the conditions of all measurements.
        lines: the measurements so far.

    Raises:
        RunError: the file has other conditions, is damaged, or cannot be read or written.
    """

    def __init__(self, file: Path, conditions: dict[str, Any] | None = None) -> None:
        self.file = file
        try:
            text = file.read_text() if file.exists() else json.dumps(conditions)
            self.conditions, *self.lines = [json.loads(line) for line in text.splitlines()]
        except OSError as error:
            raise RunError(
                f"cannot read {file} ({error.strerror}): choose another --out."
            ) from error
        except ValueError as error:  # not JSON, not text, or empty
            raise RunError(f"{file} is damaged ({error}): delete it.") from error
        for name, value in (conditions or {}).items():
            if self.conditions.get(name) != value:
                raise RunError(
                    f"{file} was started with {name} {self.conditions.get(name)}, not {value}: "
                    "choose another --out."
                )

    def add(self, measurement: dict[str, Any]) -> None:
        """Add a measurement; the file on disk is always complete."""
        self.lines.append(measurement)
        text = "".join(json.dumps(line) + "\n" for line in (self.conditions, *self.lines))
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, text.encode())
        except OSError as error:
            raise RunError(
                f"cannot write {self.file} ({error.strerror}): choose another --out."
            ) from error
