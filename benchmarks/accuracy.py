"""Accuracy, calibration and robustness of the committed model and of the fits of its recipe.

    python -m benchmarks.accuracy            prints the tables, in half a minute
    python -m benchmarks.accuracy --write    writes them into the pages, the model's card and
                                             docs/confidence.png
    python -m benchmarks.accuracy --write --add runs/best-5 --hardware "one core of an AMD EPYC"
                                             adds a finished fit, and measures of the file that it
                                             exports, to docs/fits.json first

The figures by seed are those of docs/fits.json; the others are measured with models/bn_lenet.onnx.
The means, the intervals and the verdicts on the goals follow from them.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

import click

from benchmarks.page import with_section
from training.atomic import write_whole
from training.dataset import DatasetError, FashionMNIST, Split, load
from training.evaluation import pictures
from training.evaluation.card import (
    answered_table,
    model_card,
    scores_table,
    summary_rows,
    table,
)
from training.evaluation.fits import FileMeasures, Fit, Fits
from training.evaluation.intervals import Interval, mean_interval, welch_p
from training.evaluation.measures import Evaluation, EvaluationError, evaluate, onnx_classifier
from training.evaluation.robustness import UNSEEN
from training.export import ExportError, ExportReport, Provenance, export
from training.fitting.run import Run, RunError

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "bn_lenet.onnx"
CARD = ROOT / "models" / "MODEL_CARD.md"
RUN = Run(ROOT / "models" / "run")
FITS = ROOT / "docs" / "fits.json"
PAGE = ROOT / "docs" / "performance.md"
EXPERIMENTS = ROOT / "docs" / "experiments.md"
BATCH_NORM = ROOT / "docs" / "batch-norm.md"
PICTURE = ROOT / "docs" / "confidence.png"
BEGIN = "<!-- accuracy: written by python -m benchmarks.accuracy --write -->\n"
END = "<!-- accuracy: end -->"

BEFORE_FINISH = 0.913
"""The robust mean of the recipe before it had a finish; see docs/experiments.md."""


@dataclass(frozen=True)
class Committed:
    """The committed model: its measures, and its differences from the unfolded model."""

    evaluation: Evaluation
    report: ExportReport


def measure(fits: Fits, test: Split) -> Committed:
    """Evaluate the committed model, and compare its run's model with the folded one.

    Raises:
        ExportError, EvaluationError: the model file or the fold of its run is not as it should be.
    """
    with exported(RUN, fits, test) as report:
        file = MODEL.read_bytes()
    digest = hashlib.sha256(file).hexdigest()
    report = replace(report, path=MODEL, sha256=digest, size_bytes=len(file))
    return Committed(evaluate(onnx_classifier(MODEL), test), report)


@contextmanager
def exported(run: Run, fits: Fits, test: Split) -> Iterator[ExportReport]:
    """Export a run for as long as the context lasts, at the temperature of its recipe's fits."""
    config = run.config()
    statistics = config.recipe.statistics
    source = Provenance.of(config, statistics)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / MODEL.name
        yield export(run.model(statistics), source, test, out, temperature=fits.temperature)


def card(fits: Fits, committed: Committed) -> str:
    """Return the committed model's card."""
    config = RUN.config()
    source = Provenance.of(config, config.recipe.statistics)
    return model_card(committed.report, source, fits.temperature, RUN, fits, committed.evaluation)


def added(fits: Fits, run: Run, hardware: str, data: FashionMNIST) -> Fits:
    """Return the fits and a run's, with the measures of the file that the run exports.

    Raises:
        RunError: the run is not complete, has another recipe, another data set or a seed that is
            here already, or held images out.
    """
    if run.config().dataset_sha256 != data.sha256:
        raise RunError(f"{run.folder} was fitted on another data set.")
    committed = run.folder.resolve() == RUN.folder.resolve()
    source = "models/run/results.json" if committed else "a run folder that is not committed"
    fit = Fit.of(run, hardware, source)
    fits.with_run(run, fit)  # refuses before the file is measured
    with exported(run, fits, data.test) as report:
        evaluation = evaluate(onnx_classifier(report.path), data.test)
    return fits.with_run(run, replace(fit, file=FileMeasures.of(evaluation)))


def section(fits: Fits, committed: Committed) -> str:
    """Return the section of docs/performance.md."""
    evaluation = committed.evaluation
    unseen = ", ".join(f"`{name}`" for name in UNSEEN)
    return f"""{goals(fits, committed)}

A mean has its 95 % t-interval over the seeds. It meets a goal if the whole interval does.

{_fits_sentence(fits.fits)}
Test accuracy, by the statistics that batch norm uses for prediction:

{scores_table(fits.fits)}
{_files(fits.fits)}
The served file's answers whose confidence is at least a threshold:

{answered_table(evaluation)}

![Accuracy of the answers against the share of images answered](confidence.png)

The choice of the recipe looked at all sixteen changes, on held-out images. From now on no choice
may look at eight of them: {unseen}.
The served file's mean is {evaluation.robust_mean_unseen:.4f} over these eight, and
{evaluation.robust_mean_seen:.4f} over the other eight."""


def sections(fits: Fits, committed: Committed) -> dict[Path, str]:
    """Return the text of each page's section, without the empty lines around it."""
    return {
        PAGE: section(fits, committed),
        EXPERIMENTS: recipes_table(fits),
        BATCH_NORM: scores_table(fits.fits),
    }


def recipes_table(fits: Fits) -> str:
    """Return the table that compares the recipe with those before it."""
    best = fits.accuracies(fits.recipe.statistics)
    rows = [_recipe_row(f"recipe `{fits.recipe.name}`", best, "")]
    for recipe in fits.earlier:
        p = welch_p(recipe.accuracies, best)
        rows.append(_recipe_row(recipe.name, recipe.accuracies, f"{p:.2f}"))
    return table(["", "seeds", "mean", "standard deviation", "lowest", "p"], rows)


def _recipe_row(name: str, accuracies: Sequence[float], p: str) -> list[str]:
    mean, lowest = mean_interval(accuracies), min(accuracies)
    return [name, str(mean.count), f"{mean:.4f}", f"{stdev(accuracies):.4f}", f"{lowest:.4f}", p]


def goals(fits: Fits, committed: Committed) -> str:
    """Return the table of the goals for the model."""
    evaluation, report = committed.evaluation, committed.report
    floor, (worst_name, worst) = evaluation.ece_floor, evaluation.robust_worst
    accuracies = fits.accuracies(fits.recipe.statistics)
    mean, lowest = mean_interval(accuracies), min(accuracies)
    of_lowest = fits.fits[accuracies.index(lowest)].seed
    error = (evaluation.accuracy * (1 - evaluation.accuracy) / evaluation.images) ** 0.5
    served = f"{evaluation.accuracy:.4f} (seed 0, chosen before the fits)"
    ece, robust = _over_files(fits, "ece"), _over_files(fits, "robust_mean")
    chance = f"{floor.mean:.4f} by chance ({floor.low:.4f} to {floor.high:.4f})"
    before = f"it was {BEFORE_FINISH} before the recipe had a finish"
    first = _met(evaluation.robust_mean >= 0.905)
    differing = len(report.disagreements) or "no"
    rows = [
        (
            "mean test accuracy ≥ 0.927 (stretch 0.932)",
            f"{mean:.4f} ({mean.count} seeds)",
            f"{at_least(mean, 0.927)} (stretch: {at_least(mean, 0.932)})",
        ),
        ("no seed under 0.924", f"{lowest:.4f} (seed {of_lowest})", _met(lowest >= 0.924)),
        (
            "served file ≥ 0.927",
            f"{served}, standard error {error:.4f}",
            f"{_met(evaluation.accuracy >= 0.927)} on these {evaluation.images:,} images",
        ),
        (
            "calibration error (15 bins) ≤ 0.010",
            f"{evaluation.ece:.4f}{ece}; a perfectly calibrated model: {chance}",
            _met(evaluation.ece <= 0.010),
        ),
        (
            "mean over the sixteen changed test sets ≥ 0.915 (at first 0.905)",
            f"{evaluation.robust_mean:.4f}{robust}, worst {worst:.4f} ({worst_name}); {before}",
            f"{_met(evaluation.robust_mean >= 0.915)} (at first: {first})",
        ),
        (
            "largest logit difference of the folded file ≤ 1e-4",
            f"{report.fold_error:.1e}; {differing} class differs on {report.test_images:,} images",
            _met(report.fold_error <= 1e-4),
        ),
    ]
    return table(["goal", "measured", ""], rows)


def at_least(mean: Interval, goal: float) -> str:
    """Return whether a mean is shown to meet a goal, or shown to miss it, or neither."""
    if mean.low >= goal:
        return "met"
    if mean.high < goal:
        return "missed"
    return f"not shown, the interval begins at {mean.low:.4f}"


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _fits_sentence(fits: Sequence[Fit]) -> str:
    """Return the sentences that say which seeds were fitted on which processor."""
    machines: dict[str, list[str]] = {}
    for fit in fits:
        machine = f"{fit.hardware}, torch {fit.versions['torch']}"
        machines.setdefault(machine, []).append(str(fit.seed))
    lines = [f"seeds {', '.join(seeds)} on {name}" for name, seeds in machines.items()]
    return f"{len(fits)} fits of recipe `best`: {'; '.join(lines)}."


def _over_files(fits: Fits, measure: str) -> str:
    """Return the mean of a measure over the exported files, if several were evaluated."""
    values = [getattr(fit.file, measure) for fit in fits.fits if fit.file]
    if len(values) < 2:
        return ""
    return f" (mean of {len(values)} seeds: {mean_interval(values):.4f})"


def _files(fits: Sequence[Fit]) -> str:
    """Return the table of the exported files' measures, if several were evaluated."""
    measured = [(fit.seed, fit.file) for fit in fits if fit.file]
    if len(measured) < 2:
        return ""
    names = list(FileMeasures.__dataclass_fields__)
    columns = [[getattr(file, name) for _, file in measured] for name in names]
    rows = [
        [str(seed), *(f"{values[i]:.4f}" for values in columns)]
        for i, (seed, _) in enumerate(measured)
    ]
    header = ["seed", *(name.replace("_", " ") for name in names)]
    measures = table(header, [*rows, *summary_rows(columns)])
    return f"\nThe exported files of the seeds whose weights were kept:\n\n{measures}\n"


@click.command()
@click.option("--write", is_flag=True, help="Write the page's section, the card and the picture.")
@click.option(
    "--add",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Add this run folder to docs/fits.json first; can be repeated.",
)
@click.option("--hardware", default="", help="The processor of the added fits, in words.")
def main(write: bool, add: tuple[Path, ...], hardware: str) -> None:
    """Write what is known about the accuracy of the committed model and its recipe."""
    if add and not (write and hardware):
        raise click.UsageError("--add needs --write and --hardware.")
    try:
        data, fits = load(), Fits.read(FITS)
        for folder in add:
            fits = added(fits, Run(folder), hardware, data)
        committed = measure(fits, data.test)
    except (DatasetError, EvaluationError, ExportError, RunError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(section(fits, committed))
    if write:
        fits.write(FITS)
        for page, text in sections(fits, committed).items():
            old = page.read_text(encoding="utf-8")
            write_whole(page, with_section(old, f"{text}\n", BEGIN, END).encode())
        write_whole(CARD, card(fits, committed).encode())
        probabilities = onnx_classifier(MODEL)(data.test.images)
        pictures.draw_confidence(probabilities, data.test.labels, PICTURE)


if __name__ == "__main__":
    main()
