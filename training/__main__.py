"""The command line: `python -m training fit`, `export`, `evaluate`, `norms`, `study`."""

import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training.atomic import write_whole
from training.dataset import CLASS_NAMES, DatasetError, load
from training.evaluation import pictures
from training.evaluation.card import model_card
from training.evaluation.fits import Fits
from training.evaluation.intervals import mean_interval
from training.evaluation.measures import Evaluation, EvaluationError, evaluate, onnx_classifier
from training.evaluation.robustness import UNSEEN, perturbations
from training.export import ExportError, ExportReport, Provenance, export
from training.fitting.fit import Fitted
from training.fitting.plan import FitError, create_runs, new_config, resumed_run, versions
from training.fitting.processes import fit_run, fit_runs
from training.fitting.recipes import RECIPES
from training.fitting.run import Config, Epoch, Run, RunError
from training.fitting.step import Fitting
from training.studies.command import study
from training.studies.runner import ClusterError

OVERRIDES = ("epochs", "batch_size", "learning_rate")
SETTINGS = ("seed", "device", "batch_norm", "holdout", "threads")
MAX_SEED, MAX_SEEDS = 2**31, 1000
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


class Commands(click.Group):
    """Turns our own errors into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (
            *(DatasetError, EvaluationError, ExportError, FitError, RunError),
            ClusterError,
        ) as error:
            raise click.ClickException(str(error)) from error
        except (torch.AcceleratorError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise click.ClickException(
                f"the GPU failed ({reason}): free it, or use --device cpu."
            ) from error
        except BrokenPipeError:
            raise  # click exits silently when the reader of a pipe has closed it
        except OSError as error:  # a full disk, or a folder without write permission
            where = f": {error.filename}" if error.filename else ""
            raise click.ClickException(f"{error.strerror or error}{where}.") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Fit BN-LeNet on Fashion-MNIST, and export the model file that the service serves."""


data_dir_option = click.option(
    "--data-dir",
    type=FOLDER,
    help="The folder of the data set's four files.  [default: $FASHION_MNIST_DIR, then the "
    "user's cache, into which they are downloaded]",
)


def _seeds(_: click.Context, __: click.Parameter, text: str | None) -> list[int]:
    """Read two seeds or more, `0-4` or `0,3,7`; return them sorted, without repetition."""
    if text is None:
        return []
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            raise click.BadParameter(f"{text!r} is not a list of seeds such as 0-4 or 0,3,7.")
        if found[-1] > MAX_SEED or len(found) > MAX_SEEDS:
            raise click.BadParameter(
                f"{text!r} is too much: at most {MAX_SEEDS:,} seeds, none above {MAX_SEED}."
            )
        seeds.update(found)
    if len(seeds) < 2:
        raise click.BadParameter("name at least two seeds, or use --seed for one.")
    return sorted(seeds)


def _positive(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value} is not a number above zero.")
    return value


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, on one line.")


@main.command("fit", short_help="Fit a model and write a run folder.")
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="chapter",
    show_default=True,
    help="The settings of the fit.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="The device; auto is CUDA if there is a CUDA device.",
)
@click.option("--epochs", type=click.IntRange(1), help="The epochs, instead of the recipe's.")
@click.option(
    "--batch-size", type=click.IntRange(2), help="The batch size, instead of the recipe's."
)
@click.option(
    "--learning-rate",
    type=float,
    callback=_positive,
    help="The highest learning rate, instead of the recipe's.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_SEED),
    default=0,
    show_default=True,
    help="The seed of the weights, the order of the images and the augmentation.",
)
@click.option(
    "--seeds",
    callback=_seeds,
    help="Fit several seeds, such as 0-19 or 0,3,7, into run folders OUT-SEED: on a CPU in "
    "several processes, on a GPU one after the other.",
)
@click.option(
    "--batch-norm",
    type=click.Choice(["torch", "scratch"]),
    default="torch",
    show_default=True,
    help="The batch-norm layer: torch's, or ours from scratch.",
)
@click.option(
    "--holdout",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Validate on this many of the training images, and do not use the test set.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads of torch; the same number gives the same bits.  [default: the "
    "machine's cores, divided among the seeds; at most one for every 64 images of a batch]",
)
@click.option(
    "--graphs/--no-graphs",
    default=True,
    help="On a GPU, replay steps as CUDA graphs.  [default: if a replay equals an eager step]",
)
@click.option("--out", type=FOLDER, help="The run folder.  [default: runs/RECIPE-SEED]")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out with the settings that it was started with.",
)
@click.option("--quiet", is_flag=True, help="Print only errors.")
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
    graphs: bool,
    quiet: bool,
    as_json: bool,
    data_dir: Path | None,
    **options: Any,
) -> None:
    """Fit a model and write a run folder; with --seeds, several models and folders."""
    given = _given(ctx)
    if seeds and (resume or "seed" in given):
        raise click.UsageError("--seeds starts new runs: leave out --seed and --resume.")
    folder = out or Path("runs") / (recipe if seeds else f"{recipe}-{seed}")
    data = load(data_dir)
    if resume:
        runs = [resumed_run(folder, given | {"dataset_sha256": data.sha256})]
        _tell_other_versions(runs[0].config())
    else:
        changes = {name: options[name] for name in OVERRIDES if options[name] is not None}
        config = new_config(
            replace(RECIPES[recipe], **changes),
            data.sha256,
            **{name: options[name] for name in SETTINGS if name in options},
            processes=len(seeds) or 1,
        )
        runs = create_runs(folder, config, seeds or [seed], len(data.train.labels))
    silent = quiet or as_json
    try:
        if seeds:
            on_epoch = None if silent else _print_epoch
            found = fit_runs(data, runs, graphs=graphs, on_epoch=on_epoch)
            fitted = {run.folder: one for run, one in found}
        else:
            with _display(runs[0].config(), silent) as watch:
                fitted = {folder: fit_run(data, runs[0], graphs=graphs, **watch)}
    except KeyboardInterrupt:
        _tell_how_to_go_on(runs)
        raise click.exceptions.Exit(130) from None
    for run in runs:
        pictures.draw_run(run)
    if as_json:
        lines = [_as_json(run, fitted[run.folder]) for run in runs]
        click.echo(json.dumps(lines if seeds else lines[0]))
    elif not quiet:
        _print_scores(runs, [fitted[run.folder] for run in runs])


def _given(ctx: click.Context) -> dict[str, Any]:
    """Return the settings that the command line gives explicitly."""
    return {
        name: ctx.params[name]
        for name in ("recipe", *OVERRIDES, *SETTINGS)
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def _tell_other_versions(config: Config) -> None:
    now = versions()
    if config.versions != now:
        listed = ", ".join(f"{name} {number}" for name, number in now.items())
        click.echo(f"Resumed with {listed}; the run was started with other versions.", err=True)


def _tell_how_to_go_on(runs: Sequence[Run]) -> None:
    epochs = runs[0].config().recipe.epochs
    for run in runs:
        if not run.complete:
            click.echo(
                f"Interrupted after {len(run.metrics())} of {epochs} epochs, which are saved.\n"
                "Continue with: python -m training fit --resume --out "
                f"{shlex.quote(str(run.folder))}",
                err=True,
            )


def _as_json(run: Run, fitted: Fitted) -> dict[str, Any]:
    scores = {name: asdict(score) for name, score in fitted.scores.items()}
    return {"run": str(run.folder), "scores": scores, "seconds": fitted.seconds}


def _print_scores(runs: Sequence[Run], fitted: Sequence[Fitted]) -> None:
    """Print accuracies (of several seeds the mean and spread) and the next command."""
    holdout = runs[0].config().holdout
    judged = f"{holdout:,} held-out images" if holdout else "test set"
    click.echo(f"{'Statistics':<12} accuracy on the {judged}")
    for name in fitted[0].scores:
        found = [one.scores[name].accuracy for one in fitted]
        if len(found) > 1:
            spread = f"standard deviation {stdev(found):.4f}"
            click.echo(f"{name:<12} {mean_interval(found):.4f} (mean, 95 % t-interval), {spread}")
        else:
            click.echo(f"{name:<12} {found[0]:.4f}")
    first, *others = [shlex.quote(str(run.folder)) for run in runs]
    click.echo(f"Run folder{'s' * bool(others)}: {' '.join([first, *others])}")
    if holdout:
        click.echo(f"Next: fit on all images, then export that run with --held-out {first}")
    else:
        more = "".join(f" --seeds-from {other}" for other in others)
        click.echo(f"Next: python -m training export {first}{more} --out {first}/bn_lenet.onnx")


def _print_epoch(run: Run, line: Epoch) -> None:
    """Print one line for an epoch of one of several seeds; runs in that seed's process."""
    config = run.config()
    click.echo(f"seed {config.seed}  {_epoch_line(config, line)}", err=True)


def _epoch_line(config: Config, line: Epoch) -> str:
    return (
        f"epoch {line.epoch}/{config.recipe.epochs}  loss {line.loss:.4f}  "
        f"training {line.train_accuracy:.4f}  "
        f"{'held out' if config.holdout else 'test'} {line.accuracy:.4f}  "
        f"{line.images_per_second:,.0f} images/s"
    )


@contextmanager
def _display(config: Config, quiet: bool) -> Iterator[dict[str, Callable[..., None]]]:
    """Show the progress of a fit: a live bar in a terminal, and one line for each epoch."""
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
                loss=fitting.loss.item() / seen,
                accuracy=fitting.correct.item() / seen,
                speed=(progress.tasks[0].speed or 0.0) * images,
            )

        def on_epoch(line: Epoch) -> None:
            progress.update(
                task,
                completed=line.epoch,
                epoch=line.epoch,
                loss=line.loss,
                accuracy=line.train_accuracy,
                speed=line.images_per_second,
            )
            progress.console.print(_epoch_line(config, line), highlight=False)

        yield {"on_batch": on_batch, "on_epoch": on_epoch}


@main.command("export", short_help="Write the model of a run as an ONNX file.")
@click.argument("run", type=FOLDER)
@click.option(
    "--out",
    type=FILE,
    required=True,
    help="The ONNX file to write; its card goes into the same folder.",
)
@click.option(
    "--statistics",
    type=click.Choice(["moving", "population"]),
    help="The batch-norm statistics of the file.  [default: the recipe's]",
)
@click.option(
    "--temperature",
    type=float,
    callback=_positive,
    help="Divide the logits by this.  [default: from --held-out, else the recipe's]",
)
@click.option(
    "--held-out",
    type=FOLDER,
    help="A run of the same recipe with --holdout; the temperature comes from it.",
)
@click.option(
    "--seeds-from",
    type=FOLDER,
    multiple=True,
    help="A run of the same recipe with another seed, for the card's table; can be repeated.",
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
    """Fold and verify RUN's model; write it as ONNX, with MODEL_CARD.md in the same folder."""
    runs = [Run(folder) for folder in dict.fromkeys((run, *seeds_from))]
    fits = Fits.of(runs, Run(held_out) if held_out else None)  # refuses before anything is written
    exported_run, config = runs[0], runs[0].config()
    statistics = statistics or config.recipe.statistics
    temperature = temperature or fits.temperature
    test, source = load(data_dir).test, Provenance.of(config, statistics)
    with _steps("comparing the file with the model", 2 + len(perturbations())) as on_step:
        model = exported_run.model(statistics)
        exported = export(model, source, test, out, temperature=temperature)
        on_step("evaluating the file")
        evaluation = evaluate(onnx_classifier(out), test, on_step)
    card = model_card(exported, source, temperature, exported_run, fits, evaluation)
    write_whole(out.parent / "MODEL_CARD.md", card.encode())
    pictures.draw_confusion(evaluation.confusion, out.parent / "confusion.png")
    if as_json:
        click.echo(json.dumps(asdict(exported), default=str))
    else:
        _print_export(exported)


def _print_export(exported: ExportReport) -> None:
    file = shlex.quote(str(exported.path))
    click.echo(
        f"{exported.path}: {exported.size_bytes:,} bytes, SHA-256 {exported.sha256}\n"
        f"test accuracy {exported.test_accuracy:.4f}, fold error {exported.fold_error:.1e}"
    )
    if exported.ties:
        click.echo(
            f"images with two equally good classes: {list(exported.ties)}; of these, the file and "
            f"the unfolded model differ on {list(exported.disagreements)}"
        )
    click.echo(f"Next: python -m training evaluate {file}")


@contextmanager
def _steps(first: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar in a terminal; yield a function to call as each next step begins."""
    console = Console(stderr=True)
    with Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task(first, total=total)
        yield lambda name: progress.update(task, description=name, advance=1)


@main.command("evaluate", short_help="Evaluate an ONNX file on the test set.")
@click.argument("model", type=FILE)
@json_option
@data_dir_option
def evaluate_command(model: Path, as_json: bool, data_dir: Path | None) -> None:
    """Evaluate an ONNX file on the test set: accuracy, classes, confidence, robustness.

    "Unseen" are the changed images that no choice of a recipe may look at.
    """
    classify, test = onnx_classifier(model), load(data_dir).test
    with _steps("images as they are", 1 + len(perturbations())) as on_step:
        evaluation = evaluate(classify, test, on_step)
    if as_json:
        names = ("robust_mean", "robust_mean_seen", "robust_mean_unseen", "robust_worst")
        robust = {name: getattr(evaluation, name) for name in names}
        click.echo(json.dumps(asdict(evaluation) | robust))
        return
    console, floor = Console(highlight=False), evaluation.ece_floor
    console.print(
        f"accuracy {evaluation.accuracy:.4f}  NLL {evaluation.nll:.4f}  ECE {evaluation.ece:.4f}  "
        f"({evaluation.images:,} images)\n"
        "a perfectly calibrated model with these confidences: "
        f"ECE {floor.mean:.4f}\n({floor.low:.4f} to {floor.high:.4f} in 90 % of samples)"
    )
    for table in _tables(evaluation):
        console.print(table)
    click.echo(f"Serve it: BNLENET_MODEL_PATH={shlex.quote(str(model))} python -m service")


def _tables(evaluation: Evaluation) -> Iterator[Table]:
    # Narrow enough for 80 columns; rich would cut the names of a wider table.
    confusion = Table("true class", title="Answers by class", box=SIMPLE_HEAD, padding=(0, 0))
    for heading in (*map(str, range(10)), "prec.", "recall"):
        confusion.add_column(heading, justify="right", no_wrap=True)
    for i, name in enumerate(CLASS_NAMES):
        shares = evaluation.precision[i], evaluation.recall[i]
        counts = map(str, evaluation.confusion[i])
        confusion.add_row(f"{i} {name}", *counts, *(f"{share:.3f}" for share in shares))
    yield confusion
    confident = Table("confidence", "answered", "accuracy", title="Answers by least confidence")
    for one in evaluation.answered:
        right = "none" if one.accuracy is None else f"{one.accuracy:.4f}"
        confident.add_row(f"{one.threshold:g}", f"{one.share:.4f}", right)
    yield confident
    robustness = Table("changed images", "accuracy", title="Robustness")
    for name, accuracy in evaluation.robustness.items():
        robustness.add_row(f"{name} (unseen)" if name in UNSEEN else name, f"{accuracy:.4f}")
    robustness.add_section()
    robustness.add_row("mean", f"{evaluation.robust_mean:.4f}")
    robustness.add_row("mean of the unseen", f"{evaluation.robust_mean_unseen:.4f}")
    robustness.add_row("mean of the others", f"{evaluation.robust_mean_seen:.4f}")
    robustness.add_row(f"worst: {evaluation.robust_worst[0]}", f"{evaluation.robust_worst[1]:.4f}")
    yield robustness


@main.command("norms", short_help="Print what the batch norms of a run learnt.")
@click.argument("run", type=FOLDER)
@click.option("--picture", type=FILE, help="Also draw them into this PNG file.")
@click.option(
    "--unit",
    type=FILE,
    help="Also draw one unit's values before and after its batch norm into this PNG file.",
)
@json_option
@data_dir_option
def norms_command(
    run: Path, picture: Path | None, unit: Path | None, as_json: bool, data_dir: Path | None
) -> None:
    """Print the gamma and beta that every batch-norm layer of RUN learnt."""
    model = Run(run).model()
    parameters = pictures.affine_parameters(model)
    if picture:
        pictures.draw_norms(model, picture)
    if unit:
        pictures.draw_unit(model, load(data_dir).test.images, unit)
    if as_json:
        click.echo(json.dumps({n: {"gamma": g, "beta": b} for n, (g, b) in parameters.items()}))
        return
    for name, (gamma, beta) in parameters.items():
        click.echo(f"{name}\n  gamma {_numbers(gamma)}\n  beta  {_numbers(beta)}")


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:+.3f}" for value in values)


main.add_command(study)


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m training"))
