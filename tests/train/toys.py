"""Toys to train on, for tests and for the scripts that they start as processes of their own.

Test folders are no packages: `conftest.py` loads this file by its path, and a script in this
folder imports it by name.
"""

import numpy as np
import torch
from PIL import Image

from coat_deploy.data.dataset import Sample
from coat_deploy.errors import ImageError
from coat_deploy.network.coat import CoaT, create_network
from coat_deploy.spec import ModelSpec, Preprocess
from coat_deploy.train.recipe import Recipe

SIDE = 32
"""Side of the toys' input: the least that their networks take."""
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (180, 180, 40), (40, 180, 180)])


class Pictures:
    """A `Dataset` in memory: noisy images of one colour a class, classes in turn.

    Images are all different; their sizes are `size` (width, height), or go round a list of them.
    Those whose index is in `broken` raise ImageError.
    """

    def __init__(self, count=24, classes=3, size=(20, 26), broken=(), seed=0):
        self.label_names = tuple(f"class {c}" for c in range(classes))
        self.labels = np.arange(count, dtype=np.int64) % classes
        self.broken = frozenset(broken)
        self._sizes = [size] if isinstance(size[0], int) else list(size)
        self._seed = seed

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"picture {index}"

    def image(self, index):
        if index in self.broken:
            raise ImageError(f"{self.name(index)}: is broken.")
        width, height = self._sizes[index % len(self._sizes)]
        noise = np.random.default_rng([self._seed, index]).integers(-40, 40, (height, width, 3))
        pixels = (COLOURS[self.labels[index]] + noise).clip(0, 255)
        return Image.fromarray(pixels.astype(np.uint8))


class Reel:
    """A `Stream` of `Pictures`: each epoch turns them by as many places; broken ones are passed.

    `length` is what it says, which may be more than it holds.
    """

    def __init__(self, pictures, length=None):
        self.pictures, self.label_names = pictures, pictures.label_names
        self.length = len(pictures) if length is None else length

    def samples(self, epoch, shard=0, shards=1, skip=0):
        count = len(self.pictures)
        order = [(epoch + i) % count for i in range(count)]
        for index in order[shard::shards][skip:]:
            if index not in self.pictures.broken:
                image = self.pictures.image(index)
                yield Sample(image, int(self.pictures.labels[index]), self.pictures.name(index))


def recipe(**changes) -> Recipe:
    """Two epochs of batches of 4 with the least augmentation."""
    plain = {
        "epochs": 2, "batch_size": 4, "learning_rate": 0.05, "warmup_epochs": 1.0,
        "ema_decay": 0.9, "crop_min": 1.0, "crop_aspect": 1.0, "flip": 0.0, "rand_augment": 0,
        "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "mix_share": 0.0, "repeats": 1, "size": SIDE,
        "workers": 0, "validate_every": 1,
    }  # fmt: skip
    return Recipe().replace(plain | changes)


def spec(variant="coat_lite_toy", classes=3, **how) -> ModelSpec:
    """The spec of a toy for the classes of `Pictures`."""
    network = create_network(variant, classes)
    names = tuple(f"class {c}" for c in range(classes))
    preprocess = Preprocess((SIDE, SIDE), **how)
    return ModelSpec(variant, classes, network.variant.num_features, preprocess, names)


def network(variant="coat_lite_toy", classes=3, seed=0, **options) -> CoaT:
    """A toy network, drawn from `seed`, with weights large enough for images to differ."""
    torch.manual_seed(seed)
    created = create_network(variant, classes, **options)
    with torch.no_grad():
        for parameter in created.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(parameter.shape[0] / parameter.numel()) ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return created
