"""Which images a step sees: a function of seed, epoch and step, for any number of processes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import UsageError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of `images` images over epochs, and its parts.

    Every epoch is a new permutation; what does not fill a step is left out, other images each
    time. With `repeats` (repeated augmentation, arXiv 1902.05509) an epoch shows as many images,
    but fewer different ones, each so many times in a row: in the same step, mostly.

    A step takes `accumulate` batches from each of `processes`. Two processes of batches of B see
    in a step what one process of batches of 2 B sees.
    """

    images: int
    batch_size: int
    accumulate: int = 1
    processes: int = 1
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse fewer images than a step takes."""
        if self.images >= self.step_images:
            return
        counts = {
            "batch_size": (self.batch_size, "images a batch"),
            "accumulate": (self.accumulate, "batches a step"),
            "the number of processes": (self.processes, "processes"),
        }
        many = {name: f"{n} {what}" for name, (n, what) in counts.items() if n > 1}
        raise UsageError(
            f"training images: fewer than one step takes (got {self.images}, expected at least "
            f"{self.step_images}: {' x '.join(many.values())}). Lower {' or '.join(many)}."
        )

    @property
    def step_images(self) -> int:
        """Images of a step, over all processes."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.images // self.step_images

    def epoch(self, epoch: int) -> Indices:
        """Return the indices of an epoch, as many as there are images."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
        return np.repeat(order, self.repeats)[: self.images].astype(np.int64)

    def batches(self, epoch: int, process: int, first_step: int = 0) -> list[Indices]:
        """Return a process's batches of an epoch from a step on, `accumulate` a step."""
        assert 0 <= process < self.processes
        order = self.epoch(epoch)[: self.steps * self.step_images]
        shape = (self.steps, self.accumulate, self.processes, self.batch_size)
        mine = order.reshape(shape)[first_step:, :, process]
        return list(mine.reshape(-1, self.batch_size))


def draw_seed(*position: int) -> int:
    """Return the seed of what is drawn at a position: (seed, step, batch, process).

    A generator seeded anew for every batch has no state to save, and a step's randomness does
    not depend on what ran before it.
    """
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))
