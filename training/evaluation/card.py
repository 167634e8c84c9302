"""The model card: what was exported, how it was made, and how good it is."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev

from training.dataset import CLASS_NAMES
from training.evaluation.measures import Evaluation
from training.export import ExportReport, Provenance
from training.fitting.recipes import NO_AUGMENTATION, RECIPES
from training.fitting.run import Config, Run, RunError

SHOWN_ELSEWHERE = ("name", "origin", "statistics", "temperature")


@dataclass(frozen=True)
class Runs:
    """The runs that a model card reports.

    Attributes:
        exported: the run of the exported model.
        seeds: the runs of the table by seed; `exported` is one of them.
        held_out: a run of the same recipe with held-out images, which decide the temperature.
    """

    exported: Run
    seeds: Sequence[Run]
    held_out: Run | None = None

    def check(self) -> None:
        """Refuse runs that do not belong into one card.

        Raises:
            RunError: a run is not complete, has another recipe, has the same seed as another run,
                or held images out although it must not; or `held_out` held none out.
        """
        recipe = self.exported.config().recipe
        for run in [*self.seeds, *([self.held_out] if self.held_out else [])]:
            run.results()
            if run.config().recipe != recipe:
                raise RunError(
                    f"{run.folder} was fitted by another recipe than {self.exported.folder}: use "
                    "runs of one recipe."
                )
        if len({run.config().seed for run in self.seeds}) < len(self.seeds):
            raise RunError("two of the runs have the same seed: name one run for each seed.")
        for run in self.seeds:
            if run.config().holdout:
                raise RunError(
                    f"{run.folder} held images out: fit it without --holdout, or name it with "
                    "--held-out."
                )
        if self.held_out and not self.held_out.config().holdout:
            raise RunError(f"{self.held_out.folder} held no images out: fit it with --holdout.")

    def temperature(self) -> float:
        """Return the best temperature on the held-out images; without such a run, the recipe's."""
        if self.held_out is None:
            return self.exported.config().recipe.temperature
        return float(self.held_out.results()["temperature"])


def model_card(
    exported: ExportReport,
    source: Provenance,
    temperature: float,
    runs: Runs,
    evaluation: Evaluation,
) -> str:
    """Write the model card (Mitchell et al., "Model Cards for Model Reporting", 2019) in Markdown.

    Args:
        exported: the report of the export.
        source: where the weights come from.
        temperature: the logits are divided by it.
        runs: the exported run, and the other runs of its recipe.
        evaluation: the measures of the exported file on the test set.
    """
    config = runs.exported.config()
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

{_scores(runs.seeds)}

## Classes

{table(["class", "precision", "recall"], [[n, f"{p:.3f}", f"{r:.3f}"] for n, p, r in shares])}

![Confusion matrix](confusion.png)

## Robustness

Accuracy on changed test sets. `training/evaluation/robustness.py` defines the changes.

{table(["change", "accuracy"], [[n, f"{a:.4f}"] for n, a in evaluation.robustness.items()])}

## Calibration

Temperature {temperature:g}, folded into the last layer. {_choice(runs.held_out)}

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
| fitting took | {runs.exported.results()["seconds"]["fit"]:.0f} s on {config.device} |

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


def _scores(runs: Sequence[Run]) -> str:
    """Return a table of accuracies by seed and statistics, with mean and standard deviation."""
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


def _choice(held_out: Run | None) -> str:
    """Return the sentence that says how the temperature was chosen."""
    if held_out is None:
        return "It was not chosen on held-out images."
    results, holdout = held_out.results(), held_out.config().holdout
    scores = [f"{n} {s['accuracy']:.4f}" for n, s in results["scores"].items()]
    return (
        f"It gave the\nlowest cross-entropy on {holdout:,} images held out of a fit of the same "
        f"recipe. Accuracies on\nthese images, by batch-norm statistics: {', '.join(scores)}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _standard_error(evaluation: Evaluation) -> float:
    return math.sqrt(evaluation.accuracy * (1 - evaluation.accuracy) / evaluation.images)
