"""Does every layer need batch norm (exercise 3).

The study fits all 16 subsets of the four places: a two-level factorial design. The main effect of
a place is the change of accuracy when this place gets batch norm, averaged over all settings of the
other three. An interaction of two places is how much the effect of one changes with the other.
"""

from collections.abc import Sequence
from itertools import combinations, product
from statistics import fmean

from matplotlib.figure import Figure

from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import Interval, mean_interval, paired_difference
from training.studies.fits import batch_norm, fitted, lenet, samples, scores
from training.studies.study import TOO_SHORT, Line, Report, Scale, Study, Task, arms, by_seed

PLACES = ("conv1", "conv2", "linear1", "linear2")
SUBSETS = ["".join(bits) for bits in product("01", repeat=4)]


def tasks(scale: Scale) -> list[Task]:
    """Return a fit for each subset and seed; "1010" has batch norm after conv1 and linear1."""
    return arms(scale, places=SUBSETS)


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit LeNet with batch norm in these places."""
    parts = samples(data, task["images"])
    network = lenet([batch_norm if bit == "1" else None for bit in task["places"]])
    network = fitted(network, parts.train, seed=task["seed"], epochs=task["epochs"])
    return scores(network, parts)


def effect(lines: Sequence[Line], places: Sequence[int]) -> Interval:
    """Return a main effect (one place) or an interaction (several), with its interval over seeds.

    It is a contrast of a 2^4 factorial: a subset's sign is the product of its signs at the places
    (Box, Hunter and Hunter, "Statistics for Experimenters", chapter 5).
    """
    contrasts = [0.0] * len(by_seed(lines, "held_out", places=SUBSETS[0]))
    for subset in SUBSETS:
        sign = 1
        for place in places:
            sign *= 1 if subset[place] == "1" else -1
        for index, value in enumerate(by_seed(lines, "held_out", places=subset)):
            contrasts[index] += sign * value / 8
    return mean_interval(contrasts)


def report(lines: Sequence[Line]) -> Report:
    """Return the effects, and the accuracy of each subset."""
    main = {name: effect(lines, [i]) for i, name in enumerate(PLACES)}
    best = max(main, key=lambda name: main[name].mean)
    accuracies = {s: mean_interval(by_seed(lines, "held_out", places=s)) for s in SUBSETS}
    singles = {s: accuracies[s].mean for s in SUBSETS if s.count("1") == 1}
    single = max(singles, key=lambda s: singles[s])
    where, one = PLACES[single.index("1")], singles[single]
    full, none = accuracies["1111"].mean, accuracies["0000"].mean
    with_all, without, with_one = (
        by_seed(lines, "held_out", places=s) for s in ("1111", "0000", single)
    )
    gain = paired_difference(with_all, without)
    behind = paired_difference(with_one, with_all)
    if gain.low <= 0:
        answer = "No: batch norm in all four places does not measurably raise the accuracy here"
    elif one >= full:
        answer = f"No: one batch norm, after {where}, raises the accuracy as much as all four"
    elif one >= none + 0.5 * (full - none):
        share = (one - none) / (full - none)
        answer = f"No: one batch norm, after {where}, gives {share:.0%} of the gain of all four"
    else:
        share = max(0.0, (one - none) / (full - none))
        answer = (
            f"One is not enough: the best single place, after {where}, gives only {share:.0%} of "
            "the gain of all four"
        )
    answer += (
        f" (accuracy {none:.3f} without batch norm, {one:.3f} with one, {full:.3f} with four; one "
        f"minus four: {behind:+.3f}). Averaged over all settings of the other places, batch norm "
        f"after {best} raises the accuracy by {main[best]:.3f}."
    )
    effects = [[name, f"{value:+.4f}"] for name, value in main.items()]
    effects += [
        [" and ".join(PLACES[i] for i in pair), f"{effect(lines, pair):+.4f}"]
        for pair in combinations(range(4), 2)
    ]
    rows = [
        [
            ", ".join(p for p, bit in zip(PLACES, s, strict=True) if bit == "1") or "none",
            f"{accuracies[s]:.4f}",
            f"{fmean(by_seed(lines, 'test', places=s)):.4f}",
        ]
        for s in sorted(SUBSETS, key=lambda s: accuracies[s].mean)
    ]
    return Report(
        answer,
        f"""## Effects

{table(["effect", "change of held-out accuracy"], effects)}

A line with one place is its main effect: the change of accuracy when the place gets batch norm,
averaged over all settings of the other three. A line with two places is their interaction: half of
the change of one place's effect when the other place gets batch norm. A negative interaction means
that the two partly replace each other.

## All 16 subsets

{table(["batch norm after", "held-out accuracy", "test"], rows)}

{TOO_SHORT}""",
        "Above: the mean accuracy of each subset, with its interval, in ascending order. Below: a "
        "blue square means batch norm after this layer.",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw the accuracies in ascending order; below, a row of marks for each place."""
    figure.set_size_inches(8, 4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    values = {s: mean_interval(by_seed(lines, "held_out", places=s)) for s in SUBSETS}
    order = sorted(SUBSETS, key=lambda s: values[s].mean)
    above.errorbar(
        range(16),
        [values[s].mean for s in order],
        [values[s].half_width for s in order],
        fmt="o",
        capsize=3,
    )
    above.set(ylabel="held-out accuracy")
    above.grid(alpha=0.3)
    for x, subset in enumerate(order):
        for y, bit in enumerate(subset):
            below.scatter(x, y, marker="s", color="tab:blue" if bit == "1" else "0.88", s=60)
    below.set_yticks(range(4), PLACES)
    below.set_xticks([])
    below.set(ylim=(3.6, -0.6), xlabel="where batch norm is (blue)")


STUDY = Study(
    "places", "Does every layer need batch norm?", "exercise 3", tasks, measure, report, draw
)
