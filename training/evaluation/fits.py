"""The finished fits of one recipe that the card and the pages report, in one JSON file.

docs/fits.json is the committed one. The table by seed and its intervals are computed from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from training.atomic import write_whole
from training.evaluation.measures import Evaluation
from training.fitting.recipes import Recipe
from training.fitting.run import Run, RunError


@dataclass(frozen=True)
class Score:
    """Accuracy (0 to 1) and mean cross-entropy (nats; None if it was not kept)."""

    accuracy: float
    loss: float | None = None


@dataclass(frozen=True)
class FileMeasures:
    """Measures of a fit's exported file on the test set; `Evaluation` explains them."""

    accuracy: float
    nll: float
    ece: float
    robust_mean: float
    robust_mean_seen: float
    robust_mean_unseen: float

    @classmethod
    def of(cls, evaluation: Evaluation) -> "FileMeasures":
        """Return the measures of an evaluation."""
        return cls(**{name: getattr(evaluation, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Fit:
    """One finished fit.

    Attributes:
        seed: the run's seed.
        scores: by batch-norm statistics: of the unfolded model, on the test set or the held-out
            images.
        device: "cpu" or "cuda".
        hardware: the processor, in words.
        versions: of python, torch and numpy, as far as known.
        source: where the figures come from.
        seconds: wall-clock time of the fit; None if it was not kept.
        holdout: the number of images held out; zero means that the test set judged.
        temperature: the best one on the held-out images; 1 without any.
        file: measures of the exported file, if it was evaluated.
    """

    seed: int
    scores: dict[str, Score]
    device: str
    hardware: str
    versions: dict[str, str]
    source: str
    seconds: float | None = None
    holdout: int = 0
    temperature: float = 1.0
    file: FileMeasures | None = None

    @classmethod
    def of(cls, run: Run, hardware: str = "", source: str = "") -> "Fit":
        """Return the fit of a complete run.

        Raises:
            RunError: the run is not complete, or damaged.
        """
        config, results = run.config(), run.results()
        return cls(
            config.seed,
            {name: Score(**score) for name, score in results["scores"].items()},
            config.device,
            hardware,
            config.versions,
            source or str(run.folder),
            results["seconds"]["fit"],
            config.holdout,
            results["temperature"],
        )


@dataclass(frozen=True)
class EarlierRecipe:
    """The test accuracies of a recipe that is no longer in the repository, one for each seed."""

    name: str
    source: str
    accuracies: list[float]


@dataclass(frozen=True)
class Fits:
    """The fits of one recipe.

    Attributes:
        recipe: the recipe of all of them.
        fits: fits on the whole training set, one for each seed.
        held_out: a fit with held-out images, which decide the temperature.
        earlier: recipes before this one.
    """

    recipe: Recipe
    fits: Sequence[Fit]
    held_out: Fit | None = None
    earlier: Sequence[EarlierRecipe] = field(default_factory=list)

    @classmethod
    def of(cls, seeds: Sequence[Run], held_out: Run | None = None) -> "Fits":
        """Return the fits of run folders.

        Raises:
            RunError: a run is not complete, has another recipe than the first, has the same seed as
                another run, or held images out although it must not; or `held_out` held none out.
        """
        recipe = seeds[0].config().recipe
        fits = cls(recipe, [])
        for run in seeds:
            fits = fits.with_run(run, Fit.of(run))
        if held_out is None:
            return fits
        if not held_out.config().holdout:
            raise RunError(f"{held_out.folder} held no images out: fit it with --holdout.")
        fits.must_have_its_recipe(held_out)
        return replace(fits, held_out=Fit.of(held_out))

    @classmethod
    def read(cls, path: Path) -> "Fits":
        """Read a file of fits.

        Raises:
            RunError: the file is missing or damaged.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise RunError(f"there is no file of fits {path}.") from error
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"]))
            raise RunError(f"{path} is damaged ({where}: {wrong['msg']}).") from error

    def write(self, path: Path) -> None:
        """Write the fits as JSON, completely or not at all."""
        adapter: TypeAdapter[Any] = TypeAdapter(Fits)
        write_whole(path, adapter.dump_json(self, indent=1) + b"\n")

    def with_run(self, run: Run, fit: Fit) -> "Fits":
        """Return these fits and the one of a run on the whole training set, sorted by seed.

        Raises:
            RunError: the run has another recipe, held images out, or its seed is here already.
        """
        self.must_have_its_recipe(run)
        if fit.holdout:
            raise RunError(
                f"{run.folder} held images out: fit it without --holdout, or name it with "
                "--held-out."
            )
        if fit.seed in {other.seed for other in self.fits}:
            raise RunError(
                f"there is a fit with seed {fit.seed} already: two of the runs have the same seed."
            )
        return replace(self, fits=sorted([*self.fits, fit], key=lambda one: one.seed))

    def must_have_its_recipe(self, run: Run) -> None:
        """Refuse a run of another recipe.

        Raises:
            RunError: the run has another recipe.
        """
        if run.config().recipe != self.recipe:
            raise RunError(f"{run.folder} was fitted by another recipe: use runs of one recipe.")

    @property
    def temperature(self) -> float:
        """The best temperature on the held-out images; without such a fit, the recipe's."""
        return self.held_out.temperature if self.held_out else self.recipe.temperature

    def accuracies(self, statistics: str) -> list[float]:
        """Return the accuracies by seed, with these batch-norm statistics."""
        return [fit.scores[statistics].accuracy for fit in self.fits]
