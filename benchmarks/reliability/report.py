"""The findings of the campaigns: rows with goals, the file of records, the page's tables."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from training.evaluation.intervals import mean_interval

CAMPAIGNS = {
    "soak": "80 % of capacity, every form of body, some bad and some cut off",
    "overload": "ten times capacity",
    "fuzz": "the decoders of pictures, bodies and tensors, in the process",
    "requests": "mutated requests over sockets",
    "faults": "processes, files, disks and descriptors that fail",
    "artefacts": "mutated model files",
    "training": "kill -9 at random moments, resume",
    "scale": "real containers behind HAProxy",
}
"""The campaigns and what they attack. Each is a module of this package with a function `run`."""
BEGIN = "<!-- written by `python -m benchmarks.reliability` -->\n"
END = "<!-- end -->"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Options:
    """The size of a campaign.

    Attributes:
        minutes: the length of the soak.
        inputs: the number of inputs, requests, files or kills; None means the campaign's own.
        quick: a little of everything, to check that it runs.
        failures: the folder for inputs that broke something.
    """

    minutes: float = 30
    inputs: int | None = None
    quick: bool = False
    failures: Path = Path(".cache") / "reliability"

    def count(self, full: int, quick: int) -> int:
        """Return the number of inputs: `inputs`, or else the campaign's own number."""
        return self.inputs or (quick if self.quick else full)

    def save(self, name: str, data: bytes) -> None:
        """Save an input that broke something."""
        self.failures.mkdir(parents=True, exist_ok=True)
        (self.failures / name).write_bytes(data)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: the name of the figure.
        figure: the formatted figure.
        goal: the formatted goal; empty means none.
        met: whether the figure meets the goal; None means no goal, or not measured.
    """

    what: str
    figure: str
    goal: str = ""
    met: bool | None = None

    @classmethod
    def at_most(cls, what: str, value: float, limit: float, unit: str = "") -> "Row":
        """Return the row of a figure that must not exceed a limit; NaN misses the goal."""
        goal = "0" if limit == 0 else f"≤ {_number(limit)}{unit}"
        return cls(what, f"{_number(value)}{unit}", goal, value <= limit)

    @classmethod
    def at_least(cls, what: str, value: float, limit: float, unit: str = "") -> "Row":
        """Return the row of a figure that must be at least a limit."""
        return cls(what, f"{_number(value)}{unit}", f"≥ {_number(limit)}{unit}", value >= limit)

    @classmethod
    def mean_at_least(cls, what: str, values: Sequence[float], limit: float) -> "Row":
        """Return the row of a mean, with its 95 % interval, that must be at least a limit."""
        mean = mean_interval(values)
        figure = f"{mean:.3f} ({mean.count} rounds)"
        return cls(what, figure, f"≥ {_number(limit)}", mean.mean >= limit)

    @classmethod
    def holds(cls, what: str, figure: str, goal: str, met: bool) -> "Row":
        """Return the row of a condition that holds or not."""
        return cls(what, figure, goal, met)

    @classmethod
    def not_measured(cls, what: str, reason: str) -> "Row":
        """Return the row of a figure that cannot be measured here."""
        return cls(what, f"{NOT_MEASURED}: {reason}")

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing."""
        return {True: "met", False: "missed", None: ""}[self.met]


@dataclass(frozen=True)
class Record:
    """A finished campaign: its rows, its command and its machine."""

    campaign: str
    command: str
    machine: str
    seconds: float
    rows: tuple[Row, ...]


def append(file: Path, record: Record) -> None:
    """Add a finished campaign to the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def read(file: Path) -> dict[str, Record]:
    """Return the last record of each campaign; empty if there is no file."""
    records = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            rows = tuple(Row(**row) for row in fields.pop("rows"))
            records[fields["campaign"]] = Record(**fields, rows=rows)
    return records


def section(records: Mapping[str, Record]) -> str:
    """Return the page's tables: the figures, and the commands with their machines."""
    figures = [["campaign", "", "figure", "goal", ""]]
    runs = [["campaign", "command", "minutes", "machine"]]
    for name, attacks in CAMPAIGNS.items():
        record = records.get(name)
        rows = record.rows if record else [Row(attacks, NOT_MEASURED)]
        figures += [[name, row.what, row.figure, row.goal, row.verdict] for row in rows]
        if record:
            minutes = f"{record.seconds / 60:.1f}"
            runs.append([name, f"`{record.command}`", minutes, record.machine])
    return f"{_table(figures)}\n" + (f"\n{_table(runs)}\n" if len(runs) > 1 else "")


def machine() -> str:
    """Return machine, versions, and the load average of the minute before."""
    names = []
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    libraries = " ".join(f"{name} {version(name)}" for name in ("onnxruntime", "uvicorn", "pillow"))
    processor = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
    kernel = platform.release().partition("-")[0]  # the rest names the machine's own build
    system = f"{platform.system()} {kernel}, Python {platform.python_version()}"
    return f"{processor}, load {os.getloadavg()[0]:.1f}, {system}, {libraries}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{' --- |' * len(lines[0])}", *rest])
