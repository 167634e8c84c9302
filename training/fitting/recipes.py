"""Recipes: all settings of a fit, except the data, the seed and the machine."""

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import PositiveInt

from training.fitting.augmentation import Augmentation

NO_AUGMENTATION = Augmentation()
Statistics = Literal["moving", "population"]


@dataclass(frozen=True)
class Recipe:
    """The settings of a fit.

    Attributes:
        name: its name on the command line.
        origin: where it comes from and how it was chosen: a sentence for the model card.
        optimizer: "sgd" (plain), or "muon" for the hidden weights and AdamW for the rest.
        learning_rate: the highest learning rate.
        other_learning_rate: with Muon, the highest learning rate of AdamW.
        batch_size: images in a step; the last, smaller batch of an epoch is used too.
        epochs: passes over the training set.
        warm_up: the learning rate rises linearly from zero over this share of all steps, then falls
            linearly to zero; None means a constant learning rate.
        weight_decay: for the weights of convolutions and linear layers only; with Muon, not for
            the last layer's weights.
        averaging: the length of the exponential moving average of weights and statistics, as a
            share of all steps; the average is the model. Zero means that the last weights are.
        augmentation: random changes to the training images.
        finish: this share of the epochs, at the end, uses `finish_augmentation` instead; its
            images are more like real ones.
        finish_augmentation: see `finish`.
        statistics: the batch-norm statistics of the exported model.
        temperature: the exported logits are divided by it.
    """

    name: str
    origin: str
    optimizer: Literal["sgd", "muon"] = "sgd"
    learning_rate: float = 0.1
    other_learning_rate: float = 0.0
    batch_size: PositiveInt = 128
    epochs: PositiveInt = 10
    warm_up: float | None = None
    weight_decay: float = 0.0
    averaging: float = 0.0
    augmentation: Augmentation = NO_AUGMENTATION
    finish: float = 0.0
    finish_augmentation: Augmentation = NO_AUGMENTATION
    statistics: Statistics = "population"
    temperature: float = 1.0

    def rate(self, progress: float) -> float:
        """Return the learning rate, as a share of the highest, after `progress` (0 to 1)."""
        if self.warm_up is None:
            return 1.0
        if progress < self.warm_up:
            return max(progress / self.warm_up, 0.01)
        return (1 - progress) / (1 - self.warm_up)

    def augmentation_in(self, epoch: int) -> Augmentation:
        """Return the random changes in epoch 1, 2, ..."""
        finishing = epoch > self.epochs - round(self.finish * self.epochs)
        return self.finish_augmentation if finishing else self.augmentation


STRONG = Augmentation(
    flip=True,
    shift=2.0,
    rotation=6.0,
    scale=0.06,
    sharpness=0.7,
    sharpness_share=0.15,
    contrast=0.3,
    brightness=0.3,
    gamma=0.2,
)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("chapter", "The chapter's own hyper-parameters, taken as they are."),
        Recipe(
            "best",
            "Chosen among optimisers, augmentations and ways to end on 10,000 images held out of "
            "the training set, by accuracy on them as they are and changed in the sixteen ways "
            "below; then fitted on all 60,000.",
            optimizer="muon",
            learning_rate=0.02,
            other_learning_rate=0.01,
            batch_size=512,
            epochs=120,
            warm_up=0.2,
            weight_decay=0.05,
            averaging=0.02,
            augmentation=STRONG,
            # No rotation, no scaling: resampling blurs, and these images must look like real ones.
            finish=0.1,
            finish_augmentation=replace(
                STRONG, rotation=0.0, scale=0.0, shift=1.0, contrast=0.2, brightness=0.2, gamma=0.1
            ),
            statistics="moving",
        ),
    )
}
