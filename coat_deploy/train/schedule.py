"""What changes from step to step, as functions of the step alone.

Nothing here has a state, so a resumed training goes on exactly where it was.
"""

import math
from dataclasses import dataclass

from coat_deploy.train.recipe import Recipe

BASE_IMAGES = 512
"""Images of a step that `Recipe.learning_rate` is meant for; it grows with their number."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over `steps` steps of `images` images each.

    It rises linearly over the warm-up, then falls by half a cosine (arXiv 1608.03983, without
    restarts). As in the authors' scripts the peak is in proportion to the images of a step.
    """

    recipe: Recipe
    images: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.recipe.learning_rate * self.images / BASE_IMAGES

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        assert 0 <= step < self.steps
        warmup = round(self.recipe.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            low = self.recipe.warmup_factor
            return self.peak * (low + (1 - low) * step / warmup)
        low = self.recipe.final_factor
        done = (step - warmup) / max(1, self.steps - 1 - warmup)
        return self.peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def average_decay(updates: int, decay: float) -> float:
    """Return the decay of the weights' average at an update, counted from 0.

    Smaller at first, so that the random weights of the beginning are soon forgotten, as in
    TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + updates) / (10 + updates))
