"""The run folder: the files that a fit writes. A killed fit loses one epoch at most.

config.json              recipe, seed, device, versions, data set
metrics.jsonl            one line for each epoch
checkpoint.safetensors   the model's state_dict; at the end also
                             `population.<layer>.mean`, `.variance`
state.safetensors        all tensors that a resumed fit needs; removed when the fit is complete
results.json             written last: accuracy with each kind of statistics
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from training.atomic import write_whole
from training.batch_norm import set_statistics
from training.fitting.augmentation import Augmentation
from training.fitting.recipes import Recipe, Statistics
from training.model import BNLeNet, norm_layers

MOMENTS = ("mean", "variance")
"""The two population statistics of each layer in the checkpoint."""


class RunError(Exception):
    """A run folder cannot be used; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Config:
    """The configuration of a run; on the same CPU, equal configurations give equal weights.

    Attributes:
        recipe: how to fit.
        seed: decides the weights, the order of the images and the augmentation.
        device: "cpu" or "cuda".
        batch_norm: the batch-norm layer: ours ("scratch") or torch's ("torch").
        holdout: the number of training images, the last ones, that are held out.
        threads: CPU threads of torch.
        dataset_sha256: `FashionMNIST.sha256`.
        versions: of python, torch and numpy.
    """

    recipe: Recipe
    seed: NonNegativeInt
    device: Literal["cpu", "cuda"]
    batch_norm: Literal["scratch", "torch"]
    holdout: NonNegativeInt
    threads: PositiveInt
    dataset_sha256: str
    versions: dict[str, str]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Config":
        """Return the configuration that `asdict` turned into these fields, also through JSON.

        Raises:
            TypeError, KeyError, ValueError: a field is missing, unknown or of another type.
        """
        recipe = fields["recipe"]
        augmentations = {
            name: Augmentation(**recipe[name]) for name in ("augmentation", "finish_augmentation")
        }
        config = cls(**{**fields, "recipe": Recipe(**recipe | augmentations)})
        try:
            return TypeAdapter(cls).validate_python(asdict(config))
        except ValidationError as error:
            wrong = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl: accuracies from 0 to 1, the loss in nats, wall-clock times.

    `accuracy` is on the held-out images (without any, on the test set), with moving statistics;
    the fit makes no choice by it. `learning_rate` is the last step's. `images_per_second` is the
    number of training images divided by the time of the whole epoch, evaluation included.
    """

    epoch: int
    loss: float
    train_accuracy: float
    accuracy: float
    learning_rate: float
    images_per_second: float
    seconds: float


class Run:
    """A run folder on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, config: Config) -> "Run":
        """Make a new run folder.

        Raises:
            RunError: the folder exists and is not empty, or cannot be made.
        """
        run = cls(folder)
        run.must_be_new()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run.write_json("config.json", asdict(config))
        except OSError as error:
            raise RunError(f"cannot write the run folder {folder}: {error.strerror}.") from error
        return run

    def must_be_new(self) -> None:
        """Refuse a folder that is not empty.

        Raises:
            RunError: the folder is not empty, or it cannot be read.
        """
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise RunError(
                    f"{self.folder} already exists: continue it with --resume, or choose another "
                    "--out."
                )
        except OSError as error:
            raise RunError(f"cannot read the folder {self.folder}: {error.strerror}.") from error

    def config(self) -> Config:
        """Read config.json.

        Raises:
            RunError: this is not a run folder.
        """
        try:
            return Config.from_fields(json.loads((self.folder / "config.json").read_text()))
        except FileNotFoundError as error:
            raise RunError(f"{self.folder} is not a run folder: it has no config.json.") from error
        except (TypeError, KeyError, ValueError) as error:
            raise RunError(f"{self.folder / 'config.json'} is damaged ({error}).") from error

    @property
    def complete(self) -> bool:
        """Whether the fit is complete."""
        return (self.folder / "results.json").exists()

    def metrics(self) -> list[Epoch]:
        """Read metrics.jsonl; empty before the end of the first epoch.

        Raises:
            RunError: it is damaged.
        """
        file = self.folder / "metrics.jsonl"
        try:
            return [Epoch(**json.loads(line)) for line in file.read_text().splitlines()]
        except FileNotFoundError:
            return []
        except (TypeError, ValueError) as error:
            raise RunError(f"{file} is damaged ({error}).") from error

    def results(self) -> dict[str, Any]:
        """Read results.json.

        Raises:
            RunError: the fit is not complete, or the file is damaged.
        """
        self.config()  # raises the right error if this is not a run folder
        file = self.folder / "results.json"
        if not self.complete:
            raise RunError(f"{self.folder} is not complete: continue it with fit --resume.")
        try:
            results: dict[str, Any] = json.loads(file.read_text())
            if missing := {"scores", "confusion", "temperature", "seconds"} - results.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except (ValueError, AttributeError) as error:
            raise RunError(f"{file} is damaged ({error}).") from error
        return results

    def checkpoint(self) -> dict[str, Tensor]:
        """Read checkpoint.safetensors: float32 tensors on the CPU.

        Raises:
            RunError: there is no checkpoint yet, or it is damaged.
        """
        return self._tensors("checkpoint.safetensors")

    def model(self, statistics: Statistics = "moving") -> BNLeNet:
        """Return the model of the checkpoint, float32 on the CPU, in prediction mode.

        Raises:
            RunError: there is no checkpoint yet, it is damaged, or it has no such statistics.
        """
        batch_norm = self.config().batch_norm
        tensors = self.checkpoint()
        model = BNLeNet(batch_norm).eval().requires_grad_(False)
        names = model.state_dict().keys()
        try:
            model.load_state_dict({name: tensors[name] for name in names})
            if statistics == "population":
                for name, layer in norm_layers(model).items():
                    mean, variance = (tensors[f"population.{name}.{m}"] for m in MOMENTS)
                    set_statistics(layer, mean, variance)
        except KeyError as error:
            raise RunError(
                f"the checkpoint in {self.folder} lacks {error.args[0]}: continue it with --resume."
            ) from error
        except RuntimeError as error:  # a tensor of another shape
            raise RunError(f"the checkpoint in {self.folder} is of another model.") from error
        return model

    def save_epoch(
        self,
        metrics: Sequence[Epoch],
        checkpoint: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> None:
        """Write the files of an epoch; the state last, because a resumed fit relies on it."""
        lines = [json.dumps(asdict(epoch)) + "\n" for epoch in metrics]
        self.write("metrics.jsonl", "".join(lines).encode())
        self.save_checkpoint(checkpoint)
        # Only one key of metadata: safetensors would write several in random order.
        self.write("state.safetensors", save(dict(state), {"epochs": str(len(metrics))}))

    def save_checkpoint(self, tensors: Mapping[str, Tensor]) -> None:
        """Write checkpoint.safetensors."""
        self.write("checkpoint.safetensors", save(dict(tensors)))

    def load_state(self, into: Mapping[str, Tensor]) -> list[Epoch]:
        """Copy the saved state into tensors, in place; return the metrics of its epochs.

        Raises:
            RunError: the saved state is damaged, or belongs to another model.
        """
        file = self.folder / "state.safetensors"
        if not file.exists():
            return []
        tensors = self._tensors(file.name)
        with safe_open(file, "pt") as opened:
            epochs = int((opened.metadata() or {}).get("epochs", 0))
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in into.items()}:
            raise RunError(f"{file} belongs to another model: start again in another folder.")
        metrics = self.metrics()
        if not 1 <= epochs <= len(metrics):
            raise RunError(
                f"{self.folder} lacks metrics of its epochs: start again in another folder."
            )
        for name, tensor in into.items():
            tensor.copy_(tensors[name])
        return metrics[:epochs]

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json and remove the state."""
        self.write_json("results.json", results)
        (self.folder / "state.safetensors").unlink(missing_ok=True)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, completely or not at all."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def write(self, name: str, data: bytes) -> None:
        """Write a file, completely or not at all."""
        write_whole(self.folder / name, data)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except FileNotFoundError as error:
            raise RunError(
                f"{self.folder} has no {name} yet: it appears at the end of the first epoch."
            ) from error
        except (OSError, SafetensorError) as error:  # OSError: it is a folder, for example
            raise RunError(f"{self.folder / name} is damaged ({error}).") from error
