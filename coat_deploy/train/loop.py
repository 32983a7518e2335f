"""The training loop: steps, epochs, evaluations, checkpoints.

What a step sees and draws depends on seed and step alone (`order.py`), the rate too
(`schedule.py`). So a checkpoint is tensors and a `Position`, and a training that was killed
anywhere and resumed ends, on a CPU, with the bits of one that was not.

Processes, mixed precision and sharding are Accelerate's.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from coat_deploy.errors import TrainingError
from coat_deploy.network.variants import get_variant
from coat_deploy.train.augment import Augment
from coat_deploy.train.average import Average
from coat_deploy.train.checkpoint import Checkpoint, Position
from coat_deploy.train.evaluation import Evaluation
from coat_deploy.train.losses import Losses
from coat_deploy.train.memory import is_out_of_memory, out_of_memory
from coat_deploy.train.mixing import Mixing, soft_cross_entropy
from coat_deploy.train.optimiser import create_optimiser, set_rate
from coat_deploy.train.order import draw_seed
from coat_deploy.train.plan import Abandoned, Outcome, Plan, Stopped
from coat_deploy.train.progress import EpochReport, StepReport, Watcher
from coat_deploy.train.schedule import Schedule
from coat_deploy.train.state import (
    load_checkpoint_into,
    load_weights,
    read_checkpoint,
    read_weights,
    same_everywhere,
)
from coat_deploy.train.supply import STORED_SIDE, Batch, Share, open_supply

_log = logging.getLogger(__name__)

READ_EVERY = 10
"""Steps between readings of the loss where it lies on a device: each one waits for the device."""


class Training:
    """A training under way. `stop` is asked after every step whether to save and leave.

    Raises: TrainingError, UsageError or ImageError before the first step for what cannot be.
    """

    def __init__(
        self,
        plan: Plan,
        accelerator: Accelerator,
        watchers: Sequence[Watcher] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self.accelerator, self.stop = plan, accelerator, stop
        self.watchers = watchers if accelerator.is_main_process else ()
        recipe = self.recipe = plan.recipe
        device = accelerator.device
        height, width = plan.spec.preprocess.input_size
        if recipe.train_size:
            height = width = recipe.train_size
        memory = int(recipe.memory_gib * 2**30)
        share = Share(
            recipe.batch_size, recipe.accumulate, accelerator.process_index,
            accelerator.num_processes, recipe.repeats, recipe.seed,
        )  # fmt: skip
        side = round(STORED_SIDE * max(height, width))
        self.supply = open_supply(plan.train, side, share, memory, recipe.workers)
        self.evaluation = Evaluation(
            plan.validation, plan.spec.preprocess, recipe.batch_size, memory,
            accelerator.is_main_process,
        )  # fmt: skip
        how = plan.spec.preprocess
        self.augment = Augment(recipe, (height, width), how.mean, how.std, device)
        self.size = (height, width)
        self.mixing = Mixing(recipe, plan.spec.num_classes)
        order = self.supply.order
        self.schedule = Schedule(recipe, order.step_images, order.steps)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.network = plan.network.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        variant = get_variant(plan.spec.architecture)
        if recipe.compile:
            self.network.compile()
        self.prepared, self.optimiser = accelerator.prepare(
            self.network, create_optimiser(self.network, variant, recipe)
        )
        self.average = Average(self.network, recipe.ema_decay)
        self.best: Mapping[str, Tensor] = {}
        self.position = Position()
        self.saved_at = time.monotonic()
        self.losses = Losses(plan.folder)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises TrainingError for one of another training."""
        for name, value in self._run().items():
            if checkpoint.run.get(name) != value:
                raise TrainingError(
                    f"{self.plan.folder}: the checkpoint is of another training ({name}: got "
                    f"{value!r:.80}, expected {checkpoint.run.get(name)!r:.80}). Resume with what "
                    "it was begun with, or begin anew with --overwrite."
                )
        load_checkpoint_into(
            self.accelerator, self.network, self.optimiser, self.average, checkpoint
        )
        self.position, self.best = checkpoint.position, checkpoint.best

    def _run(self) -> dict[str, Any]:
        """Return what a resumed training must have in common with this one."""
        order = self.supply.order
        return {
            "variant": self.plan.spec.architecture,
            "classes": list(self.plan.spec.label_names),
            "images": order.images,
            "images a step": order.step_images,
            **self.plan.run,
        }

    def run(self) -> Outcome:
        """Train to the end.

        Raises: Stopped; Diverged; Abandoned; TrainingError when memory runs out.
        """
        try:
            return self._to_the_end()
        except RuntimeError as error:
            if self.accelerator.num_processes > 1 and _is_lost_connection(error):
                raise Abandoned(
                    "training: another process ended, and this one cannot go on alone. See what "
                    "that one said, then go on with --resume."
                ) from error
            raise

    def _to_the_end(self) -> Outcome:
        order, position = self.supply.order, self.position
        while position.step < self.schedule.steps and not self._is_stale():
            epoch, first = divmod(position.step, order.steps)
            self.prepared.train()
            self._epoch(epoch, first)
            self._end_epoch(epoch + 1)
        self._save()
        if position.best_epoch:
            load_weights(self.network, self.best)
            return self._outcome(position.best_epoch)
        with self.average.in_place():
            return self._outcome(position.step // order.steps)

    def _is_stale(self) -> bool:
        patience = self.recipe.patience
        return patience > 0 and self.position.stale >= patience

    def _outcome(self, epoch: int) -> Outcome:
        quality = self.evaluation.run(self.prepared, self.accelerator)
        return Outcome(
            read_weights(self.network), quality, epoch, self.supply.order.images,
            self.position.seconds,
        )  # fmt: skip

    def _epoch(self, epoch: int, first: int) -> None:
        """Run the steps of an epoch (counted from 0) from the step `first` of it on."""
        order = self.supply.order
        every = 1 if self.accelerator.device.type == "cpu" else READ_EVERY
        with contextlib.closing(self.supply.batches(epoch, first)) as batches:
            for step in range(epoch * order.steps + first, (epoch + 1) * order.steps):
                self._step(step, epoch, batches)
                if (step + 1) % order.steps == 0:
                    break  # saved, if need be, once the epoch is evaluated
                if len(self.losses) >= every:
                    self._read_losses()
                    self._save_if_asked()
        self._read_losses()

    def _step(self, step: int, epoch: int, batches: Generator[Batch]) -> None:
        """Take one step of the optimiser, of `accumulate` batches."""
        position = self.position
        began, data_before = time.perf_counter(), position.data_seconds
        rate = self.schedule.learning_rate(step)
        set_rate(self.optimiser, rate)
        losses: list[Tensor] = []
        names: list[str] = []
        for part in range(self.recipe.accumulate):
            waiting = time.perf_counter()
            batch = next(batches)
            # Not before: what reads images ahead may draw, too, where an epoch is taken up.
            place = (step, part, self.accelerator.process_index)
            torch.manual_seed(draw_seed(self.recipe.seed, *place))
            position.data_seconds += time.perf_counter() - waiting
            losses.append(self._learnt(batch))
            names += batch.names
        self.average.update()
        took = time.perf_counter() - began
        position.step = step + 1
        position.epoch_seconds += took
        position.seconds += took
        report = StepReport(
            step + 1, self.schedule.steps, epoch + 1, self.recipe.epochs, math.nan, rate,
            self.schedule.images, took, position.data_seconds - data_before,
        )  # fmt: skip
        self.losses.add(torch.stack(losses).mean(), report, names)

    def _prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a batch on the device, augmented and mixed, and its targets (B, K)."""
        device = self.accelerator.device
        images, aspects, labels = (
            tensor.to(device, non_blocking=True)
            for tensor in (batch.images, batch.aspects, batch.labels)
        )
        done = self.position.step / self.schedule.steps
        return self.mixing(self.augment(images, aspects), labels, done)

    def _learnt(self, batch: Batch) -> Tensor:
        """Add a batch's gradient and return its loss; see `_descend`.

        Raises: TrainingError that says what would fit when memory runs out.
        """
        try:
            began = time.perf_counter()
            images, targets = self._prepare(batch)
            self.position.data_seconds += time.perf_counter() - began
            return self._descend(images, targets)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = error.with_traceback(None)  # the trace holds on to the tensors
        raise out_of_memory(self.network, self.size, len(batch.names)) from failed

    def _descend(self, images: Tensor, targets: Tensor) -> Tensor:
        """Add a batch's gradient, and step if it is the last of its step; return its loss."""
        accelerator, recipe = self.accelerator, self.recipe
        with accelerator.accumulate(self.prepared):
            loss = soft_cross_entropy(self.prepared(images), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients and recipe.clip_norm:
                accelerator.clip_grad_norm_(self.prepared.parameters(), recipe.clip_norm)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return loss.detach().float()

    def _read_losses(self) -> None:
        """Add up and tell the losses of the steps since the last reading. Raises Diverged."""
        for report in self.losses.read(self.accelerator):
            self.position.loss_sum += report.loss
            for watcher in self.watchers:
                watcher.step(report)

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate if it is time (epochs counted from 1), tell, and save if asked or due."""
        recipe, position = self.recipe, self.position
        quality = None
        if epoch % recipe.validate_every == 0 or epoch == recipe.epochs:
            began = time.perf_counter()
            with self.average.in_place():
                quality = self.evaluation.run(self.prepared, self.accelerator)
                self._compare(quality.top1.value, epoch)
            position.seconds += time.perf_counter() - began
        steps = self.supply.order.steps
        report = EpochReport(
            epoch, recipe.epochs, position.step, position.loss_sum / steps,
            self.schedule.learning_rate(position.step - 1),
            steps * self.schedule.images / max(position.epoch_seconds, 1e-9),
            position.data_seconds / max(position.epoch_seconds, 1e-9),
            position.checkpoint_seconds / max(position.seconds, 1e-9), position.seconds,
            *((quality.top1.value, quality.top5.value, quality.nll) if quality else ()),
        )  # fmt: skip
        for watcher in self.watchers:
            watcher.epoch(report)
        position.loss_sum = position.epoch_seconds = position.data_seconds = 0.0
        if epoch < recipe.epochs:
            self._save_if_asked()

    def _compare(self, top1: float, epoch: int) -> None:
        """Keep the weights in place if they are the best so far; only for an early stop."""
        if not self.recipe.patience:
            return
        if top1 > self.position.best_top1:
            self.position.best_top1, self.position.best_epoch = top1, epoch
            self.position.stale = 0
            self.best = read_weights(self.network)
        else:
            self.position.stale += 1

    def _save_if_asked(self) -> None:
        """Save when it is time to; leave when any process was asked to. Raises Stopped."""
        minutes = (time.monotonic() - self.saved_at) / 60
        stopping, due = same_everywhere(
            self.accelerator, self.stop(), minutes >= self.recipe.checkpoint_minutes
        )
        if not stopping and not due:
            return
        self._read_losses()
        self._save(required=stopping)
        if stopping:
            raise Stopped(
                f"training: stopped at step {self.position.step} of {self.schedule.steps} and "
                f"saved in {self.plan.folder}. Go on with --resume."
            )

    def _save(self, required: bool = False) -> None:
        """Write the checkpoint; when it cannot be, the last good one stays and training goes on.

        Raises: TrainingError instead where it is `required`.
        """
        began = time.perf_counter()
        checkpoint = read_checkpoint(
            self.accelerator, self.network, self.optimiser, self.average, self.position,
            self.best, self._run(),
        )  # fmt: skip
        fault = None
        if self.accelerator.is_main_process:
            try:
                checkpoint.save(self.plan.folder)
            except TrainingError as error:
                fault = error
        if fault is not None and not required:
            _log.warning("%s Training goes on meanwhile.", fault)
        (failed,) = same_everywhere(self.accelerator, fault is not None)
        if failed and required:
            raise fault or TrainingError("training: the first process could not save.")
        took = time.perf_counter() - began
        self.position.seconds += took
        self.position.checkpoint_seconds += took
        self.saved_at = time.monotonic()


def _is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether an error is that of a process whose partner is gone; gloo has no class of it."""
    return isinstance(error, torch.distributed.DistError) or "by peer" in str(error)
