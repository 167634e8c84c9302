"""Runs a study's tasks on all cores or on a cluster, and writes its page.

Every measurement is written at once, so that a stopped study can go on where it was.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import joblib
import torch
from matplotlib.figure import Figure

from training.atomic import write_whole
from training.dataset import FashionMNIST, load
from training.evaluation.pictures import save_figure
from training.studies.records import Records, conditions, in_words
from training.studies.study import HELD_OUT, RECOMPUTED, SEEDS, Line, Report, Scale, Study, Task

CONNECT_SECONDS = 10.0
OVERVIEW = """# Studies

The questions of
[the chapter on batch normalisation](https://d2l.ai/chapter_convolutional-modern/batch-norm.html),
answered by experiment. [batch-norm.md](../batch-norm.md) explains the layer.

Accuracy is the share of right answers, 0 to 1; with ten classes, guessing gives 0.1. ± is a 95 %
t-interval over fits with different seeds. "Held out" are training images that no fit sees.

`python -m training study NAME` runs a study, `--list` shows the names, `--all` runs all studies
(about two hours on two cores), `--cluster ADDRESS` sends the fits to a Dask scheduler. The command
writes this page.
"""


class ClusterError(Exception):
    """The cluster cannot be used; the message is one sentence that says what to do."""


def missing(study: Study, records: Records, scale: Scale) -> list[Task]:
    """Return the tasks that have no measurement yet."""
    return [
        task
        for task in study.tasks(scale)
        if not any(task.items() <= line.items() for line in records.lines)
    ]


def run(
    study: Study,
    records: Records,
    scale: Scale,
    *,
    data_dir: Path | None = None,
    jobs: int = -1,
    cluster: str | None = None,
    on_line: Callable[[Line], None] = lambda _: None,
) -> None:
    """Take all missing measurements of a study.

    Args:
        study: the study.
        records: the measurements so far; new ones are added.
        scale: the size of the fits.
        data_dir: the folder of the data set, also on the workers; None: see `dataset.load`.
        jobs: the number of processes; -1 means one for each core. A timed study uses one.
        cluster: the address of a Dask scheduler that gets the tasks, such as tcp://host:8786.
        on_line: called with each measurement.

    Raises:
        ClusterError: no scheduler answers at this address, or Dask's package is not installed.
        RunError: the measurements cannot be written.
    """
    todo = missing(study, records, scale)
    with _connected(cluster) if cluster else nullcontext():
        backend = joblib.parallel_config("dask") if cluster else nullcontext()
        with backend:
            results = joblib.Parallel(
                n_jobs=1 if study.timed else jobs, return_as="generator_unordered"
            )(joblib.delayed(_measure)(study.name, task, data_dir) for task in todo)
            for line in results:
                records.add(line)
                on_line(line)


def _connected(address: str):  # type: ignore[no-untyped-def] # the optional package's own type
    try:
        from distributed import Client  # noqa: PLC0415 - optional: only --cluster needs it
    except ImportError as error:
        raise ClusterError(
            "--cluster needs the package distributed: pip install distributed."
        ) from error
    try:
        return Client(address, timeout=CONNECT_SECONDS)  # type: ignore[no-untyped-call] # untyped there
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address}: start one with `dask scheduler`."
        ) from error


@cache
def _data(data_dir: Path | None) -> FashionMNIST:
    return load(data_dir)


def _measure(name: str, task: Task, data_dir: Path | None) -> Line:
    """Take one measurement in a worker process, on one thread."""
    from training.studies import STUDIES  # noqa: PLC0415 - the registry imports the studies

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return task | STUDIES[name].measure(_data(data_dir), task)
    finally:
        torch.set_num_threads(threads)


def lines_of(study: Study, records: Records, scale: Scale) -> list[Line]:
    """Return the measurements of this scale's tasks, in the order of the tasks."""
    return [
        next(line for line in records.lines if task.items() <= line.items())
        for task in study.tasks(scale)
    ]


def page(study: Study, report: Report, records: Records, scale: Scale) -> str:
    """Return a study's page in Markdown; the answer comes first."""
    options = "" if scale == Scale() else f" --seeds {scale.seeds}"
    task = study.tasks(scale)[0]
    method = report.method or (
        f"{task['images']:,} training images, {task['epochs']} epochs of SGD with batches of 128 "
        f"and a learning rate of 0.1, {scale.seeds} seeds. {RECOMPUTED} {HELD_OUT} {SEEDS}"
    )
    return f"""# {study.title}

**{report.answer}**

![{study.title}]({study.name}.png)

{report.caption}

From the chapter: {study.source}.

{report.body}

## How it was measured

{method}

{in_words(records.conditions)}.

```sh
python -m training study {study.name}{" --quick" if scale.quick else options}
```

All measurements: [{study.name}.jsonl]({study.name}.jsonl).
"""


def write(study: Study, records: Records, scale: Scale, out: Path) -> Report:
    """Write a study's page and figure into a folder; return its report."""
    lines = lines_of(study, records, scale)
    report = study.report(lines)
    figure = Figure(layout="constrained")
    study.draw(lines, figure)
    save_figure(figure, out / f"{study.name}.png")
    write_whole(out / f"{study.name}.md", page(study, report, records, scale).encode())
    return report


def overview(studies: Iterable[Study], folder: Path) -> str:
    """Return question, answer and figure of each study with a page in the folder."""
    parts, missing_names = [], []
    for study in studies:
        file = folder / f"{study.name}.md"
        if file.exists():
            answer = file.read_text(encoding="utf-8").split("**")[1]
            parts.append(
                f"## [{study.title}]({study.name}.md)\n\n{answer}\n\n"
                f"From the chapter: {study.source}.\n\n"
                f"![{study.title}]({study.name}.png)\n"
            )
        else:
            missing_names.append(f"`{study.name}`")
    if missing_names:
        parts.append(f"## Not run here yet\n\n{', '.join(missing_names)}\n")
    return "\n".join([OVERVIEW, *parts])


def begin(study: Study, out: Path, dataset_sha256: str) -> Records:
    """Open the measurements of a study in a folder; an empty record if there are none.

    Raises:
        RunError: they were started under other conditions, or cannot be read.
    """
    given = conditions(dataset_sha256=dataset_sha256) | {"threads": 1}  # as in `_measure`
    return Records(out / f"{study.name}.jsonl", given)
