"""The validation images through the network, between epochs and at the end.

Preprocessing is that of use (`images.py`): what is measured here is what an exported artifact is
held to.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from coat_deploy.data.dataset import Dataset
from coat_deploy.errors import ImageError
from coat_deploy.images import normalise, resize_and_crop
from coat_deploy.measure.quality import Quality, QualityMeter
from coat_deploy.runner import Array
from coat_deploy.spec import Preprocess
from coat_deploy.train.sharding import reshard

_log = logging.getLogger(__name__)

Pixels8 = npt.NDArray[np.uint8]


class Evaluation:
    """The validation images, cropped once if they fit into `memory_bytes`.

    told: whether this process, of several, tells which images cannot be read.
    Raises: ImageError when none can be, as soon as that is known.
    """

    def __init__(
        self, data: Dataset, how: Preprocess, batch_size: int, memory_bytes: int, told: bool
    ) -> None:
        self._data, self._how, self._batch_size = data, how, batch_size
        self._told = not told
        height, width = how.input_size
        fits = len(data) * 3 * height * width <= memory_bytes
        self._cropped = self._crop(range(len(data))) if fits else None
        if self._cropped is not None and all(crop is None for crop in self._cropped):
            raise _none_can_be_read()

    def run(self, network: nn.Module, accelerator: Accelerator) -> Quality:
        """Return how good the network is on every image, in every process alike.

        Each process runs every so many of them.
        """
        was_training = network.training
        network.eval()
        mine = range(accelerator.process_index, len(self._data), accelerator.num_processes)
        found: list[tuple[int, Array]] = []
        # Sharded networks meet at every layer, so that all must run as many batches.
        most = -(-len(self._data) // (accelerator.num_processes * self._batch_size))
        for b in range(most):
            chosen = mine[b * self._batch_size : (b + 1) * self._batch_size]
            found += self._batch(network, accelerator, chosen)
        network.train(was_training)
        reshard(network)
        if accelerator.num_processes > 1:
            found = gather_object(found)
        self._told = True
        if not found:
            raise _none_can_be_read()
        # In the images' order, so that sums are the same however many processes there are.
        found.sort(key=lambda item: item[0])
        logits = np.stack([row for _, row in found])
        meter = QualityMeter(logits.shape[1])
        meter.add(logits, self._data.labels[[index for index, _ in found]])
        quality = meter.quality()
        assert quality is not None
        return quality

    def _batch(
        self, network: nn.Module, accelerator: Accelerator, chosen: Sequence[int]
    ) -> list[tuple[int, Array]]:
        cropped = self._cropped
        crops = self._crop(chosen) if cropped is None else [cropped[i] for i in chosen]
        read = [(i, crop) for i, crop in zip(chosen, crops, strict=True) if crop is not None]
        blank = np.zeros((3, *self._how.input_size), np.uint8)
        # Crops are stored as images are, and a convolution computes otherwise in that layout.
        pixels = np.ascontiguousarray(np.stack([crop for _, crop in read] or [blank]))
        tensor = torch.from_numpy(normalise(pixels, self._how.mean, self._how.std))
        with torch.no_grad(), accelerator.autocast():
            logits = network(tensor.to(accelerator.device)).float().cpu().numpy()
        return [(i, row) for (i, _), row in zip(read, logits, strict=False)]

    def _crop(self, chosen: Sequence[int]) -> list[Pixels8 | None]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            crops = list(pool.map(self._cropped_or_fault, chosen))
        # Told here, in the images' order, which is not the order in which threads end.
        for crop in crops:
            if isinstance(crop, ImageError) and not self._told:
                _log.warning("skipped: %s", crop)
        return [None if isinstance(crop, ImageError) else crop for crop in crops]

    def _cropped_or_fault(self, index: int) -> Pixels8 | ImageError:
        try:
            image: Image.Image = self._data.image(index)
            image = resize_and_crop(image, self._how, self._data.name(index))
        except ImageError as fault:
            return fault
        return np.asarray(image).transpose(2, 0, 1)


def _none_can_be_read() -> ImageError:
    return ImageError("none of the validation images can be read. Give others, or mend them.")
