"""What people read of a fit: curves, confusion matrix, batch norm's parameters, the model card."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from training.atomic import write_whole
from training.batch_norm import affine
from training.dataset import CLASS_NAMES
from training.evaluation.measures import Evaluation
from training.export import ExportReport, Provenance
from training.fitting.recipes import NO_AUGMENTATION, RECIPES
from training.fitting.run import Config, Epoch, Run
from training.model import BNLeNet, norm_layers

SAID_ELSEWHERE = ("name", "origin", "statistics", "temperature")
Series = dict[str, tuple[list[float], list[float]]]


def affine_parameters(model: BNLeNet) -> Series:
    """Return the learnt gamma and beta of every batch-norm layer, by its name."""
    pairs = {name: affine(layer) for name, layer in norm_layers(model).items()}
    return {name: (gamma.tolist(), beta.tolist()) for name, (gamma, beta) in pairs.items()}


def draw_run(run: Run) -> None:
    """Draw a complete run's pictures into its folder: curves, confusion matrix, gamma and beta."""
    draw_curves(run.metrics(), run.folder / "curves.png")
    draw_confusion(run.results()["confusion"], run.folder / "confusion.png")
    draw_norms(run.model(), run.folder / "norms.png")


def draw_curves(metrics: Sequence[Epoch], out: Path) -> None:
    """Draw loss and accuracies by epoch, from the lines of metrics.jsonl."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [line.epoch for line in metrics]
    left.plot(epochs, [line.loss for line in metrics], marker=".")
    left.set(xlabel="epoch", ylabel="training loss (nats)")
    right.plot(epochs, [line.train_accuracy for line in metrics], marker=".", label="training")
    right.plot(epochs, [line.accuracy for line in metrics], marker=".", label="evaluation")
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend()
    save_figure(figure, out)


def draw_confusion(confusion: Sequence[Sequence[int]], out: Path) -> None:
    """Draw a confusion matrix [10, 10]: rows are the true classes, columns the answers."""
    counts = np.array(confusion)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(10), CLASS_NAMES, rotation=45, ha="right")
    axes.set_yticks(range(10), CLASS_NAMES)
    axes.set(xlabel="answer", ylabel="true class")
    for (row, column), count in np.ndenumerate(counts):
        shade = "white" if count > counts[row].sum() / 2 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=8)
    save_figure(figure, out)


def draw_norms(model: BNLeNet, out: Path) -> None:
    """Draw the learnt gamma and beta of every batch-norm layer, channel by channel."""
    parameters = affine_parameters(model)
    figure = Figure(figsize=(9, 2.2 * len(parameters)), layout="constrained")
    for axes, (name, (gamma, beta)) in zip(
        figure.subplots(len(parameters), 1), parameters.items(), strict=True
    ):
        place = np.arange(len(gamma))
        axes.bar(place - 0.2, gamma, width=0.4, label="gamma")
        axes.bar(place + 0.2, beta, width=0.4, label="beta")
        axes.set(title=name, xlim=(-1, len(gamma)))
        axes.axhline(0, color="black", linewidth=0.5)
    figure.axes[0].legend()
    save_figure(figure, out)


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure as PNG, whatever the file is called; the same figure gives the same bytes."""
    drawn = BytesIO()
    # So without the creating software's version.
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    write_whole(out, drawn.getvalue())


def model_card(
    exported: ExportReport,
    source: Provenance,
    temperature: float,
    run: Run,
    runs: Sequence[Run],
    evaluation: Evaluation,
    validation: Run | None = None,
) -> str:
    """Write the model card (Mitchell et al., "Model Cards for Model Reporting", 2019) in Markdown.

    Args:
        exported: what the export wrote.
        source: where its weights come from.
        temperature: by which its logits are divided.
        run: the run that was exported.
        runs: all runs of the recipe to show by seed, this one among them.
        evaluation: of the exported file on the test set.
        validation: a run of the recipe with images held out, if statistics and temperature were
            chosen on it.
    """
    config = run.config()
    recipe, (worst_name, worst) = config.recipe, evaluation.robust_worst
    settings = {n: v for n, v in asdict(recipe).items() if n not in SAID_ELSEWHERE and v}
    for key, where in (("augmentation", ""), ("finish_augmentation", " in the finish")):
        if settings.pop(key) and getattr(recipe, key) != NO_AUGMENTATION:
            changes = asdict(getattr(recipe, key)).items()
            settings |= {f"{n}{where}": v for n, v in changes if v}
    shares = zip(CLASS_NAMES, evaluation.precision, evaluation.recall, strict=True)
    return f"""# Model card: BN-LeNet, {exported.path.name}

LeNet with batch normalisation (44,878 parameters before folding), which tells the ten kinds of
garment of Fashion-MNIST apart in 28 x 28 grey pixels. Batch norm is folded into the convolutions
and linear layers. All figures on this page were measured and written by
`python -m training export`.

| test images | accuracy | NLL | ECE (15 bins) | robust mean | robust worst |
| --- | --- | --- | --- | --- | --- |
| {evaluation.images:,} | {evaluation.accuracy:.4f} | {evaluation.nll:.4f} | {evaluation.ece:.4f} \
| {evaluation.robust_mean:.4f} | {worst:.4f} ({worst_name}) |

The standard error of an accuracy on so many images is {_standard_error(evaluation):.4f}.

## How it was made

Recipe `{recipe.name}`, seed {config.seed}. {recipe.origin}

{table(["setting", "value"], [[name, str(value)] for name, value in settings.items()])}

The same weights again, bit for bit on the same kind of processor:

```sh
{_fit_command(config)} --out runs/again
python -m training export runs/again --statistics {source.statistics} \
--temperature {temperature:g} --out {exported.path.name}
```

## Seeds, and moving averages against statistics of the whole training set

Test accuracy of the unfolded models, by the statistics that batch norm predicts with: the moving
averages of fitting; statistics of the whole training set, taken after fitting; `clean`: those
without augmentation. **This file carries: {source.statistics}.**

{_scores(runs)}

## Classes

{table(["class", "precision", "recall"], [[n, f"{p:.3f}", f"{r:.3f}"] for n, p, r in shares])}

![Confusion matrix](confusion.png)

## Robustness

Accuracy on the test set, changed in the ways that `training/evaluation/robustness.py` defines.

{table(["change", "accuracy"], [[n, f"{a:.4f}"] for n, a in evaluation.robustness.items()])}

## Calibration

Temperature {temperature:g}, folded into the last layer. {_choice(validation)}

## The file

| | |
| --- | --- |
| SHA-256 | `{exported.sha256}` |
| size | {exported.size_bytes:,} bytes |
| data set SHA-256 | `{source.dataset_sha256}` |
| largest logit difference from the unfolded model in float64 | {exported.fold_error:.1e} |
| images whose two best logits are closer than this check's limit | {len(exported.ties)} |
| of these, named differently by the file | {len(exported.disagreements)} |
| largest error of its self-test | {exported.self_test_error:.1e} |
| fitted with | {", ".join(f"{name} {number}" for name, number in config.versions.items())} |
| fitting took | {run.results()["seconds"]["fit"]:.0f} s on {config.device} |

## Intended use and limits

For teaching, for testing serving systems, and for single garments pictured as in Fashion-MNIST:
one article, front view, light on a black background, centred, 28 x 28. It has seen nothing else: it
answers one of its ten classes whatever the picture shows, and its confidence means nothing on
pictures of other things. Shirts, T-shirts, pullovers and coats are often taken for one another.
Not for decisions about people.
"""


def _fit_command(config: Config) -> str:
    """Return the command that fits by a configuration, without its --out."""
    recipe = config.recipe
    command = f"python -m training fit --recipe {recipe.name} --seed {config.seed}"
    own = RECIPES.get(recipe.name, recipe)
    for option in ("epochs", "batch_size", "learning_rate"):
        if getattr(recipe, option) != getattr(own, option):
            command += f" --{option.replace('_', '-')} {getattr(recipe, option)}"
    if config.batch_norm != "torch":
        command += f" --batch-norm {config.batch_norm}"
    return f"{command} --device {config.device} --threads {config.threads}"


def _scores(runs: Sequence[Run]) -> str:
    """Return the table of accuracies by seed and statistics, with mean and standard deviation."""
    scores = [run.results()["scores"] for run in runs]
    columns = {kind: [score[kind]["accuracy"] for score in scores] for kind in scores[0]}
    rows = [
        [str(run.config().seed), *(f"{values[i]:.4f}" for values in columns.values())]
        for i, run in enumerate(runs)
    ]
    if len(runs) > 1:
        for name, statistic in (("mean", mean), ("standard deviation", stdev)):
            rows.append([name, *(f"{statistic(values):.4f}" for values in columns.values())])
    return table(["seed", *columns], rows)


def _choice(validation: Run | None) -> str:
    """Say what statistics and temperature were chosen on."""
    if validation is None:
        return "No image was held out to choose it."
    results, holdout = validation.results(), validation.config().holdout
    scores = [f"{n} {s['accuracy']:.4f}" for n, s in results["scores"].items()]
    return (
        f"Of {holdout:,} images\nheld out of a fit of the same recipe, the temperature with the "
        f"least cross-entropy was\n{results['temperature']:g}; the accuracies on them by "
        f"statistics: {', '.join(scores)}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _standard_error(evaluation: Evaluation) -> float:
    return math.sqrt(evaluation.accuracy * (1 - evaluation.accuracy) / evaluation.images)
