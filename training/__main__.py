"""The command line: `python -m training fit`, `export`, `evaluate`, `norms`, `study`."""

import hashlib
import json
import math
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
import numpy as np
import torch
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training.atomic import write_whole
from training.dataset import CLASS_NAMES, DatasetError, FashionMNIST, load
from training.evaluation import report
from training.evaluation.measures import Evaluation, EvaluationError, evaluate, onnx_classifier
from training.export import ExportError, Provenance, export
from training.fitting.fit import FitError, Fitted, check, fit_side_by_side
from training.fitting.recipes import RECIPES
from training.fitting.run import Config, Epoch, Run, RunError
from training.fitting.step import Fitting
from training.studies import batch_size, statistics
from training.studies.records import Records, conditions

OVERRIDES = ("epochs", "batch_size", "learning_rate")
SETTINGS = ("seed", "device", "batch_norm", "holdout", "threads")
LAST_SEED, MOST_SEEDS = 2**31, 1000
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


class Commands(click.Group):
    """Turns every error of ours into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (DatasetError, EvaluationError, ExportError, FitError, RunError) as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise  # click ends quietly when nobody reads on
        except OSError as error:  # a full disk, or a place that may not be written to
            place = f": {error.filename}" if error.filename else ""
            raise click.ClickException(f"{error.strerror or error}{place}.") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Fit BN-LeNet on Fashion-MNIST, and turn a fit into the file that the service serves."""


data_dir_option = click.option(
    "--data-dir", type=FOLDER, help="Where the data set's four files are (or shall be downloaded)."
)


def _seeds(_: click.Context, __: click.Parameter, text: str | None) -> list[int]:
    """Read two seeds or more, `0-4` or `0,3,7`; return them in order, each once; none for None."""
    if text is None:
        return []
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            raise click.BadParameter(f"{text!r} is no list of seeds such as 0-4 or 0,3,7.")
        if found[-1] > LAST_SEED or len(found) > MOST_SEEDS:
            raise click.BadParameter(f"{text!r} is beyond {MOST_SEEDS:,} seeds up to {LAST_SEED}.")
        seeds.update(found)
    if len(seeds) < 2:
        raise click.BadParameter("a spread between seeds needs at least two of them.")
    return sorted(seeds)


def _positive(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value} is not a number above zero.")
    return value


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, on one line.")


@main.command("fit")
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="chapter", show_default=True)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--epochs", type=click.IntRange(1), help="Instead of the recipe's.")
@click.option("--batch-size", type=click.IntRange(2), help="Instead of the recipe's.")
@click.option("--learning-rate", type=float, callback=_positive, help="Instead of the recipe's.")
@click.option("--seed", type=click.IntRange(0, LAST_SEED), default=0, show_default=True)
@click.option(
    "--seeds",
    callback=_seeds,
    help="Fit all these seeds, 0-19 or 0,3,7, at once, as one grouped network, into run folders "
    "OUT-SEED. It is for a GPU, which one net leaves idle; a CPU is faster at one seed after the "
    "other.",
)
@click.option(
    "--batch-norm",
    type=click.Choice(["torch", "scratch"]),
    default="torch",
    show_default=True,
    help="Whose layer normalises: torch's or ours.",
)
@click.option(
    "--holdout",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Keep this many training images to validate on; the test set is then not touched.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--out", type=FOLDER, help="The run folder.  [default: runs/RECIPE-SEED]")
@click.option("--resume", is_flag=True, help="Continue the run in --out, with its own settings.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@json_option
@data_dir_option
@click.pass_context
def fit_command(
    ctx: click.Context,
    /,
    recipe: str,
    out: Path | None,
    seed: int,
    seeds: list[int],
    resume: bool,
    quiet: bool,
    as_json: bool,
    data_dir: Path | None,
    **_: Any,
) -> None:
    """Fit one model into a run folder; with --seeds, several into one each."""
    if seeds and (resume or ctx.get_parameter_source("seed") is ParameterSource.COMMANDLINE):
        raise click.UsageError("--seeds starts new runs: leave out --seed and --resume.")
    folder = out or Path("runs") / (recipe if seeds else f"{recipe}-{seed}")
    stored = Run(folder).config() if resume else None
    if stored and Run(folder).complete:
        raise RunError(f"the run in {folder} is complete: there is nothing to resume.")
    data = load(data_dir)
    config = _config(ctx, data, stored)
    if seeds:
        folders = {folder.with_name(f"{folder.name}-{each}"): each for each in seeds}
    else:
        folders = {folder: config.seed}
    check(config.recipe, len(data.train.labels), config.holdout, len(folders), config.batch_norm)
    if not stored:
        for path in folders:
            Run(path).must_be_new()
    runs = [
        Run(path) if stored else Run.create(path, replace(config, seed=each))
        for path, each in folders.items()
    ]
    fitted = _fit(data, config, runs, quiet or as_json)
    for run in runs:
        report.draw_run(run)
    if as_json:
        lines = [
            {"run": str(path), "scores": {n: asdict(s) for n, s in one.scores.items()}}
            | {"seconds": one.seconds}
            for path, one in zip(folders, fitted, strict=True)
        ]
        click.echo(json.dumps(lines if seeds else lines[0]))
    elif not quiet:
        judged = f"{config.holdout:,} held-out images" if config.holdout else "test set"
        click.echo(f"{'Statistics':<12} accuracy on the {judged}")
        for name in fitted[0].scores:
            found = [one.scores[name].accuracy for one in fitted]
            spread = f" mean, standard deviation {stdev(found):.4f}" if seeds else ""
            click.echo(f"{name:<12} {fmean(found):.4f}{spread}")
        click.echo(f"Run folder{'s' * bool(seeds)}: {' '.join(map(str, folders))}")


def _config(ctx: click.Context, data: FashionMNIST, stored: Config | None) -> Config:
    """Make the configuration that the options ask for; a resumed run's own where they are silent.

    Raises:
        RunError: an option that was given, or the data set, differs from the resumed run's.
        FitError: no CUDA device, where one is asked for.
    """
    options = {name: value for name, value in ctx.params.items() if value is not None}
    if options["device"] == "auto":
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    asked = {name: options[name] for name in options if name in SETTINGS}
    changes = {name: options[name] for name in options if name in OVERRIDES}
    config = Config(
        recipe=replace(RECIPES[options["recipe"]], **changes),
        dataset_sha256=data.sha256,
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # with its build, such as +cu130
            "numpy": np.__version__,
        },
        **asked,
    )
    if (stored or config).device == "cuda" and not torch.cuda.is_available():
        raise FitError("torch finds no CUDA device here: use --device cpu, or auto.")
    if stored is None:
        return config
    wanted, own = (
        {**asdict(c), **asdict(c.recipe), "recipe": c.recipe.name} for c in (config, stored)
    )
    given = [
        name
        for name in ("recipe", *OVERRIDES, *SETTINGS)
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    for name in [*given, "dataset_sha256"]:
        if wanted[name] != own[name]:
            raise RunError(
                f"the run was started with {name.replace('_', ' ')} {own[name]}, "
                f"not {wanted[name]}: resume it with its own settings."
            )
    if stored.versions != config.versions:
        now = ", ".join(f"{name} {number}" for name, number in config.versions.items())
        click.echo(f"Resumed with {now}, other versions than it was started with.", err=True)
    return stored


def _fit(
    data: FashionMNIST,
    config: Config,
    runs: list[Run],
    quiet: bool,
) -> list[Fitted]:
    """Fit into run folders, one a seed; when interrupted, say how to continue, and exit."""
    torch.set_num_threads(config.threads)
    try:
        with _display(config, quiet) as watch:
            return fit_side_by_side(
                data,
                config.recipe,
                [run.config().seed for run in runs],
                device=config.device,
                batch_norm=config.batch_norm,
                holdout=config.holdout,
                runs=runs,
                **watch,
            )
    except KeyboardInterrupt:
        kept = min(len(run.metrics()) for run in runs)
        commands = [
            f"python -m training fit --resume --out {shlex.quote(str(run.folder))}" for run in runs
        ]
        click.echo(
            f"Interrupted after {kept} of {config.recipe.epochs} epochs, all kept.\n"
            f"Continue with: {'; '.join(commands)}",
            err=True,
        )
        raise click.exceptions.Exit(130) from None


@contextmanager
def _display(config: Config, quiet: bool) -> Iterator[dict[str, Callable[..., None]]]:
    """Show how a fit goes: a live bar in a terminal, a plain line an epoch elsewhere."""
    console, epochs = Console(stderr=True), config.recipe.epochs
    if quiet:
        yield {}
        return
    with Progress(
        TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=epochs, epoch=1, loss=0.0, accuracy=0.0, speed=0.0)
        shown = time.monotonic()

        def on_batch(fitting: Fitting, epoch: int, seen: int) -> None:
            nonlocal shown
            if time.monotonic() - shown < 0.1:
                return
            shown = time.monotonic()
            images = len(fitting.labels)
            progress.update(
                task,
                completed=epoch - 1 + seen / images,
                epoch=epoch,
                loss=fitting.loss.mean().item() / seen,
                accuracy=fitting.correct.double().mean().item() / seen,
                speed=(progress.tasks[0].speed or 0.0) * images * len(fitting.seeds),
            )

        def on_epoch(lines: list[Epoch]) -> None:
            line, means = lines[0], ("loss", "train_accuracy", "accuracy")
            loss, training, accuracy = (fmean(getattr(x, name) for x in lines) for name in means)
            progress.update(
                task,
                completed=line.epoch,
                epoch=line.epoch,
                loss=loss,
                accuracy=training,
                speed=line.images_per_second,
            )
            progress.console.print(
                f"epoch {line.epoch}/{epochs}  loss {loss:.4f}  training {training:.4f}  "
                f"{'held out' if config.holdout else 'test'} {accuracy:.4f}  "
                f"{line.images_per_second:,.0f} images/s",
                highlight=False,
            )

        yield {"on_batch": on_batch, "on_epoch": on_epoch}


@main.command("export")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FILE, required=True, help="The ONNX file; its card goes beside it.")
@click.option(
    "--statistics",
    type=click.Choice(["moving", "population"]),
    help="Which statistics the file carries.  [default: the recipe's]",
)
@click.option("--temperature", type=float, callback=_positive, help="Not the recipe's.")
@click.option(
    "--held-out",
    type=FOLDER,
    help="A run of the same recipe with --holdout: it gives the temperature, and the card says so.",
)
@click.option(
    "--seeds-from",
    type=FOLDER,
    multiple=True,
    help="A run of the same recipe with another seed, for the card's table; may be repeated.",
)
@json_option
@data_dir_option
def export_command(
    run: Path,
    out: Path,
    statistics: Any,
    temperature: float | None,
    held_out: Path | None,
    seeds_from: tuple[Path, ...],
    as_json: bool,
    data_dir: Path | None,
) -> None:
    """Fold, verify and write RUN's model as ONNX, with MODEL_CARD.md beside it."""
    fitted = Run(run)
    config, others = fitted.config(), [Run(other) for other in dict.fromkeys((run, *seeds_from))]
    validation = Run(held_out) if held_out else None
    for other in [*others, *([validation] if validation else [])]:
        other.results()  # all must be complete before anything is written
        if other.config().recipe != config.recipe:
            raise RunError(f"{other.folder} was fitted by another recipe than {run}.")
    if len({other.config().seed for other in others}) < len(others):
        raise RunError("two of the runs have the same seed: name every seed's once.")
    for other in others:
        if other.config().holdout:
            raise RunError(
                f"{other.folder} was not fitted on all images and tested: it held some out."
            )
    if validation and not validation.config().holdout:
        raise RunError(f"{held_out} held no images out: fit it with --holdout.")
    statistics = statistics or config.recipe.statistics
    if temperature is None:
        fallback = config.recipe.temperature
        temperature = validation.results()["temperature"] if validation else fallback
    test = load(data_dir).test
    source = Provenance(
        config.recipe.name, config.seed, config.dataset_sha256, statistics, config.versions
    )
    exported = export(fitted.model(statistics), source, test, out, temperature=temperature)
    evaluation = evaluate(onnx_classifier(out), test)
    card = report.model_card(exported, source, temperature, fitted, others, evaluation, validation)
    write_whole(out.parent / "MODEL_CARD.md", card.encode())
    report.draw_confusion(evaluation.confusion, out.parent / "confusion.png")
    if as_json:
        click.echo(json.dumps(asdict(exported), default=str))
    else:
        click.echo(
            f"{out}: {exported.size_bytes:,} bytes, SHA-256 {exported.sha256}\n"
            f"test accuracy {exported.test_accuracy:.4f}, fold error {exported.fold_error:.1e}, "
            f"ties {list(exported.ties)}, disagreements {list(exported.disagreements)}"
        )


@main.command("evaluate")
@click.argument("model", type=FILE)
@json_option
@data_dir_option
def evaluate_command(model: Path, as_json: bool, data_dir: Path | None) -> None:
    """Judge an ONNX file on the test set: accuracy, classes, calibration, robustness."""
    classify = onnx_classifier(model)
    evaluation = evaluate(classify, load(data_dir).test)
    if as_json:
        worst = {"robust_mean": evaluation.robust_mean, "robust_worst": evaluation.robust_worst}
        click.echo(json.dumps(asdict(evaluation) | worst))
        return
    console = Console(highlight=False)
    console.print(
        f"accuracy {evaluation.accuracy:.4f}  NLL {evaluation.nll:.4f}  ECE {evaluation.ece:.4f}  "
        f"({evaluation.images:,} images)"
    )
    for table in _tables(evaluation):
        console.print(table)


def _tables(evaluation: Evaluation) -> Iterator[Table]:
    # Narrow enough for 80 columns, where rich would cut the names away.
    confusion = Table("true class", title="Answers by class", box=SIMPLE_HEAD, padding=(0, 0))
    for heading in (*map(str, range(10)), "prec.", "recall"):
        confusion.add_column(heading, justify="right", no_wrap=True)
    for i, name in enumerate(CLASS_NAMES):
        shares = evaluation.precision[i], evaluation.recall[i]
        counts = map(str, evaluation.confusion[i])
        confusion.add_row(f"{i} {name}", *counts, *(f"{share:.3f}" for share in shares))
    yield confusion
    robustness = Table("changed images", "accuracy", title="Robustness")
    for name, accuracy in evaluation.robustness.items():
        robustness.add_row(name, f"{accuracy:.4f}")
    robustness.add_section()
    robustness.add_row("mean", f"{evaluation.robust_mean:.4f}")
    robustness.add_row(f"worst: {evaluation.robust_worst[0]}", f"{evaluation.robust_worst[1]:.4f}")
    yield robustness


@main.command("norms")
@click.argument("run", type=FOLDER)
@click.option("--picture", type=FILE, help="Draw them into this PNG file too.")
@json_option
def norms_command(run: Path, picture: Path | None, as_json: bool) -> None:
    """Print the gamma and beta that every batch-norm layer of RUN learnt."""
    model = Run(run).model()
    parameters = report.affine_parameters(model)
    if picture:
        report.draw_norms(model, picture)
    if as_json:
        click.echo(json.dumps({n: {"gamma": g, "beta": b} for n, (g, b) in parameters.items()}))
        return
    for name, (gamma, beta) in parameters.items():
        click.echo(f"{name}\n  gamma {_numbers(gamma)}\n  beta  {_numbers(beta)}")


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:+.3f}" for value in values)


@main.group("study")
def study() -> None:
    """Answer a question by experiment: a page, a figure and all measurements in --out."""


@study.command("statistics")
@click.option("--seeds", callback=_seeds, default="0-4", show_default=True, help="Or 0,3,7.")
@click.option("--epochs", type=click.IntRange(2), default=10, show_default=True)
@click.option("--out", type=FOLDER, default=Path("runs/statistics"), show_default=True)
@json_option
@data_dir_option
def study_statistics(
    seeds: list[int], epochs: int, out: Path, as_json: bool, data_dir: Path | None
) -> None:
    """Compare moving averages with statistics of the whole training set.

    The chapter's recipe is fitted with each seed; a killed study goes on where it was.
    """
    torch.set_num_threads(1)
    data, recipe = load(data_dir), replace(RECIPES["chapter"], epochs=epochs)
    given = conditions(
        recipe=recipe.name,
        epochs=epochs,
        images=len(data.train.labels),
        test_images=len(data.test.labels),
        dataset_sha256=data.sha256,
    )
    records = Records(out / "statistics.jsonl", given)

    def on_line(line: dict[str, Any]) -> None:
        scores = "  ".join(f"{kind} {line[kind]['accuracy']:.4f}" for kind in statistics.KINDS)
        click.echo(f"seed {line['seed']}  epoch {line['epoch']}/{epochs}  {scores}", err=True)

    for seed in seeds:
        statistics.measure(data, recipe, seed, records, on_line)
    write_whole(out / "statistics.md", statistics.page(records, seeds).encode())
    statistics.draw(records, seeds, out / "statistics.png")
    if as_json:
        curves = {k: statistics.accuracies(records.lines, seeds, k) for k in statistics.KINDS}
        click.echo(json.dumps({k: asdict(statistics.spread(c)) for k, c in curves.items()}))
    else:
        click.echo(out / "statistics.md")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@study.command("batch-size")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, default=Path("runs/batch-size"), show_default=True)
@data_dir_option
def study_batch_size(run: Path, out: Path, data_dir: Path | None) -> None:
    """Let batch norm predict with batch statistics, and see what the answers of RUN become."""
    torch.set_num_threads(1)
    test, fitted = load(data_dir).test, Run(run)
    model = fitted.model(fitted.config().recipe.statistics)
    given = conditions(
        checkpoint=_sha256(run / "checkpoint.safetensors"), test_images=len(test.labels)
    )
    records = Records(out / "batch-size.jsonl", given)

    def on_line(line: dict[str, Any]) -> None:
        figures = f"accuracy {line['accuracy'][0]:.4f}  changed {line['changed'][0]:.4f}"
        click.echo(f"company {line['company']}  batch size {line['size']}  {figures}", err=True)

    batch_size.measure(model, test, records, on_line)
    write_whole(out / "batch-size.md", batch_size.page(records).encode())
    batch_size.draw(records, out / "batch-size.png")
    click.echo(out / "batch-size.md")


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m training"))
