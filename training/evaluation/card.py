"""The model card: what was exported, how it was made, and how good it is."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import stdev

from training.dataset import CLASS_NAMES
from training.evaluation.fits import Fit, Fits
from training.evaluation.intervals import mean_interval
from training.evaluation.measures import Evaluation
from training.evaluation.robustness import UNSEEN
from training.export import ExportReport, Provenance
from training.fitting.recipes import NO_AUGMENTATION, RECIPES
from training.fitting.run import Config, Run

_INTERVAL = """
The mean has its 95 % t-interval over the seeds.
"""
SHOWN_ELSEWHERE = ("name", "origin", "statistics", "temperature")


def model_card(
    exported: ExportReport,
    source: Provenance,
    temperature: float,
    run: Run,
    fits: Fits,
    evaluation: Evaluation,
) -> str:
    """Write the model card (Mitchell et al., "Model Cards for Model Reporting", 2019) in Markdown.

    Args:
        exported: the report of the export.
        source: where the weights come from.
        temperature: the logits are divided by it.
        run: the run of the exported model.
        fits: the fits of its recipe, for the table by seed; they include this run's.
        evaluation: the measures of the exported file on the test set.
    """
    config, floor = run.config(), evaluation.ece_floor
    recipe, (worst_name, worst) = config.recipe, evaluation.robust_worst
    settings = {n: v for n, v in asdict(recipe).items() if n not in SHOWN_ELSEWHERE and v}
    for key, where in (("augmentation", ""), ("finish_augmentation", " in the finish")):
        if settings.pop(key) and getattr(recipe, key) != NO_AUGMENTATION:
            changes = asdict(getattr(recipe, key)).items()
            settings |= {f"{n}{where}": v for n, v in changes if v}
    shares = zip(CLASS_NAMES, evaluation.precision, evaluation.recall, strict=True)
    return f"""# Model card: BN-LeNet, {exported.path.name}

LeNet with batch normalisation (44,878 parameters before folding). It classifies the ten kinds of
garment of Fashion-MNIST, in images of 28 x 28 grey pixels. Batch norm is folded into the
convolutions and linear layers. `python -m training export` measured all figures on this page, and
wrote them.

| test images | accuracy | NLL | ECE (15 bins) | robust mean | robust worst |
| --- | --- | --- | --- | --- | --- |
| {evaluation.images:,} | {evaluation.accuracy:.4f} | {evaluation.nll:.4f} | {evaluation.ece:.4f} \
| {evaluation.robust_mean:.4f} | {worst:.4f} ({worst_name}) |

The standard error of an accuracy on this many images is {_standard_error(evaluation):.4f}.

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

Test accuracy of the unfolded models, by batch-norm statistics: `moving` are the moving averages of
fitting, `population` the statistics of the whole training set after fitting, `clean` the same
without augmentation. **This file carries: {source.statistics}.**

{scores_table(fits.fits)}
{_INTERVAL if len(fits.fits) > 1 else ""}
## Classes

{table(["class", "precision", "recall"], [[n, f"{p:.3f}", f"{r:.3f}"] for n, p, r in shares])}

![Confusion matrix](confusion.png)

## Robustness

Accuracy on changed test sets. `training/evaluation/robustness.py` defines the changes. No choice of
a recipe may look at those marked "unseen" from now on; the present recipe was chosen by all of
them, on held-out images.

{_robustness_table(evaluation)}

## Calibration

Temperature {temperature:g}, folded into the last layer. {_choice(fits.held_out)}

A perfectly calibrated model with these confidences has by chance an ECE of {floor.mean:.4f} on
average, and {floor.low:.4f} to {floor.high:.4f} in 90 % of samples of this size.

Answers whose confidence is at least a threshold:

{answered_table(evaluation)}

## The file

| | |
| --- | --- |
| SHA-256 | `{exported.sha256}` |
| size | {exported.size_bytes:,} bytes |
| data set SHA-256 | `{source.dataset_sha256}` |
| largest logit difference from the unfolded model in float64 | {exported.fold_error:.1e} |
| images whose two best logits are closer than the limit of this check | {len(exported.ties)} |
| of these, images that the file classifies differently | {len(exported.disagreements)} |
| largest error of its self-test | {exported.self_test_error:.1e} |
| fitted with | {", ".join(f"{name} {number}" for name, number in config.versions.items())} |
| fitting took | {run.results()["seconds"]["fit"]:.0f} s on {config.device} |

## Intended use and limits

For teaching, for testing serving systems, and for pictures of single garments like those of
Fashion-MNIST: one article, front view, light on a black background, centred, 28 x 28. The model was
trained on nothing else. It answers with one of its ten classes for any picture, and for pictures of
other things its confidence means nothing. It often confuses shirts, T-shirts, pullovers and coats.
Do not use it for decisions about people.
"""


def _fit_command(config: Config) -> str:
    """Return the command that fits by a configuration, without --out."""
    recipe = config.recipe
    command = f"python -m training fit --recipe {recipe.name} --seed {config.seed}"
    own = RECIPES.get(recipe.name, recipe)
    for option in ("epochs", "batch_size", "learning_rate"):
        if getattr(recipe, option) != getattr(own, option):
            command += f" --{option.replace('_', '-')} {getattr(recipe, option)}"
    if config.batch_norm != "torch":
        command += f" --batch-norm {config.batch_norm}"
    return f"{command} --device {config.device} --threads {config.threads}"


def scores_table(fits: Sequence[Fit]) -> str:
    """Return a table of accuracies by seed and statistics.

    With several fits, the last rows are the mean with its t-interval and the standard deviation.
    """
    columns = {kind: [fit.scores[kind].accuracy for fit in fits] for kind in fits[0].scores}
    rows = [
        [str(fit.seed), *(f"{values[i]:.4f}" for values in columns.values())]
        for i, fit in enumerate(fits)
    ]
    if len(fits) > 1:
        rows += summary_rows(list(columns.values()))
    return table(["seed", *columns], rows)


def summary_rows(columns: Sequence[Sequence[float]]) -> list[list[str]]:
    """Return two rows of a table: the means with their t-intervals, and standard deviations."""
    return [
        ["mean", *(f"{mean_interval(values):.4f}" for values in columns)],
        ["standard deviation", *(f"{stdev(values):.4f}" for values in columns)],
    ]


def _robustness_table(evaluation: Evaluation) -> str:
    """Return a table of the accuracies on the changed images, with the means of both halves."""
    rows = [
        [f"{name}, unseen" if name in UNSEEN else name, f"{found:.4f}"]
        for name, found in evaluation.robustness.items()
    ]
    means = {
        "mean of the eight unseen": evaluation.robust_mean_unseen,
        "mean of the other eight": evaluation.robust_mean_seen,
        "mean": evaluation.robust_mean,
    }
    return table(["change", "accuracy"], [*rows, *([n, f"{m:.4f}"] for n, m in means.items())])


def answered_table(evaluation: Evaluation) -> str:
    """Return a table of the share and the accuracy of answers by least confidence."""
    rows = [
        [f"{one.threshold:g}", f"{one.share:.4f}", _accuracy(one.accuracy)]
        for one in evaluation.answered
    ]
    return table(["confidence at least", "share of images", "accuracy of these"], rows)


def _accuracy(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.4f}"


def _choice(held_out: Fit | None) -> str:
    """Return the sentence that says how the temperature was chosen."""
    if held_out is None:
        return "It was not chosen on held-out images."
    scores = [f"{name} {score.accuracy:.4f}" for name, score in held_out.scores.items()]
    return (
        "It gave the\n"
        f"lowest cross-entropy on {held_out.holdout:,} images held out of a fit of the "
        f"same recipe. Accuracies on\nthese images, by batch-norm statistics: {', '.join(scores)}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _standard_error(evaluation: Evaluation) -> float:
    return math.sqrt(evaluation.accuracy * (1 - evaluation.accuracy) / evaluation.images)
