"""What two processes do together, started by `test_state.py` and `test_evaluation.py`.

Each scenario leaves what it found in the folder given, for the test to hold against one process.
"""

import sys
from pathlib import Path

import torch
import toys
from torch.distributed.fsdp import fully_shard

from coat_deploy.network.variants import get_variant
from coat_deploy.train.average import Average
from coat_deploy.train.checkpoint import Position, load_checkpoint
from coat_deploy.train.evaluation import Evaluation
from coat_deploy.train.optimiser import create_optimiser, set_rate
from coat_deploy.train.processes import open_processes
from coat_deploy.train.sharding import is_sharded
from coat_deploy.train.state import (
    load_checkpoint_into,
    load_weights,
    read_checkpoint,
    read_weights,
    same_everywhere,
)

STEPS = 5
SAVED_AT = 3
IMAGES = 4
DECAY = 0.8


class Course:
    """A training of a few steps, written out: what the scenarios have in common with one process.

    Each process takes its part of every batch.
    """

    def __init__(self, accelerator, how="plain", seed=0, variant="coat_toy"):
        self.accelerator = accelerator
        self.network = toys.network(variant, seed=seed)
        if how == "sharded":
            # As Accelerate does: parts, then what is left as the outermost.
            for block in self.network.parallel_blocks:
                fully_shard(block.mlp2)
            fully_shard(self.network)
        recipe = toys.recipe(weight_decay=0.1, layer_decay=0.8)
        optimiser = create_optimiser(self.network, get_variant(variant), recipe)
        if how == "copied":
            self.prepared, self.optimiser = accelerator.prepare(self.network, optimiser)
        else:
            self.prepared, self.optimiser = self.network, accelerator.prepare_optimizer(optimiser)
        self.average = Average(self.network, DECAY)
        self.losses = []

    def batch(self, step):
        generator = torch.Generator().manual_seed(100 + step)
        images = torch.randn(IMAGES, 3, toys.SIDE, toys.SIDE, generator=generator)
        labels = torch.randint(3, (IMAGES,), generator=generator)
        part = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return images[part], labels[part]

    def step(self, step):
        self.prepared.train()
        set_rate(self.optimiser, 1e-3 / (step + 1))
        images, labels = self.batch(step)
        loss = torch.nn.functional.cross_entropy(self.prepared(images), labels)
        self.accelerator.backward(loss)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.average.update()
        self.losses.append(self.accelerator.reduce(loss.detach(), "mean").item())

    def evaluate(self):
        """Return the averaged network's logits of one image."""
        self.prepared.eval()
        with self.average.in_place(), torch.no_grad():
            return self.prepared(torch.ones(1, 3, toys.SIDE, toys.SIDE))

    def checkpoint(self, best=()):
        return read_checkpoint(
            self.accelerator, self.network, self.optimiser, self.average, Position(step=3),
            dict(best), {"toy": True},
        )  # fmt: skip

    def load(self, checkpoint):
        load_checkpoint_into(
            self.accelerator, self.network, self.optimiser, self.average, checkpoint
        )

    def outcome(self):
        with self.average.in_place():
            average = read_weights(self.network)
        weights = read_weights(self.network)
        return {"losses": self.losses, "weights": weights, "average": average}


def course(accelerator, how, folder, **options):
    """Run all steps, saving on the way, and an evaluation before each later step."""
    run = Course(accelerator, how, **options)
    logits = []
    for step in range(STEPS):
        if step == SAVED_AT:
            checkpoint = run.checkpoint()
            if accelerator.is_main_process:
                checkpoint.save(folder)
            accelerator.wait_for_everyone()
        logits.append(run.evaluate())
        run.step(step)
    return run.outcome() | {"logits": torch.cat(logits)}


def resumed(accelerator, how, folder, **options):
    """Run the steps after a checkpoint, in a network that was drawn otherwise."""
    run = Course(accelerator, how, seed=9, **options)
    run.evaluate()
    run.load(load_checkpoint(folder))
    for step in range(SAVED_AT, STEPS):
        run.step(step)
    return run.outcome()


def weights_there_and_back(accelerator):
    """Return weights read of a sharded network before and after they were loaded into another."""
    first, second = Course(accelerator, "sharded"), Course(accelerator, "sharded", seed=1)
    read = read_weights(first.network)
    second.evaluate()  # leaves whole parameters behind, which must not be taken for current
    load_weights(second.network, read)
    assert is_sharded(first.network) and not is_sharded(toys.network())
    return {"read": read, "loaded": read_weights(second.network), "logits": second.evaluate()}


def evaluated(accelerator):
    pictures = toys.Pictures(13, broken=(4,), size=[(40, 50), (32, 32), (70, 35)])
    network = accelerator.prepare(toys.network())
    found = {}
    for name, memory in (("held", 1 << 30), ("read anew", 0)):
        evaluation = Evaluation(
            pictures, toys.spec().preprocess, 3, memory, accelerator.is_main_process
        )
        found[name] = evaluation.run(network, accelerator).to_json(pictures.label_names)
    return found


def main(folder):
    torch.set_num_threads(1)
    accelerator = open_processes(toys.recipe(), "cpu")
    rank = accelerator.process_index
    found = {
        "asked": same_everywhere(accelerator, rank == 0, rank == 1, False, True),
        "evaluated": evaluated(accelerator),
        "weights": weights_there_and_back(accelerator),
    }
    for how in ("sharded", "copied"):
        found[how] = course(accelerator, how, folder / how)
        found[f"{how}, resumed"] = resumed(accelerator, how, folder / how)
    torch.save(found, folder / f"{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
