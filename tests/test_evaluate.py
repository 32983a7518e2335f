import logging

import numpy as np
import pytest
from PIL import Image

from coat_deploy.errors import ImageError, UsageError
from coat_deploy.evaluate import evaluate
from coat_deploy.images import preprocess
from coat_deploy.runner import TensorSpec
from coat_deploy.spec import Preprocess

HOW = Preprocess((16, 16), crop_pct=1.0)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Tiles:
    """Images of one colour each, named by it; an image of label None is broken."""

    def __init__(self, labels, label_names=tuple(COLOURS), size=(20, 20)):
        self.label_names = tuple(label_names)
        self.broken = {i for i, label in enumerate(labels) if label is None}
        self.labels = np.array([self.label_names.index(x or "red") for x in labels], np.int64)
        self.size = size
        self.shown = []

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"tile {index}"

    def image(self, index):
        self.shown.append(index)
        if index in self.broken:
            raise ImageError(f"tile {index}: is broken.")
        return Image.new("RGB", self.size, COLOURS[self.label_names[self.labels[index]]])


class Palette:
    """A network whose logits are the mean of red, green and blue; keeps what it was given."""

    target = "fake"
    inputs = (TensorSpec("pixels", "float32", ("batch", 3, "height", "width")),)
    outputs = (TensorSpec("logits", "float32", ("batch", 3)),)

    def __init__(self):
        self.batches = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, pixels):
        self.batches.append(pixels)
        return {"logits": pixels.mean(axis=(2, 3))}

    def bind(self, pixels):
        return lambda: self.run(pixels)


def run(data, labels=tuple(COLOURS), how=HOW, **options):
    return evaluate(Palette(), data, labels, how, **options)


def test_a_network_that_sees_every_colour_is_always_right():
    found = run(Tiles(["red", "blue", "green", "blue"]))
    assert (found.quality.images, found.quality.top1.value) == (4, 1)
    assert found.quality.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 2]]
    assert found.labels == ("red", "green", "blue")
    assert found.skipped == {} and found.seconds > 0


def test_classes_are_found_by_name_whatever_their_order():
    data = Tiles(["red", "blue", "green", "blue"], ("green", "blue", "red"))
    found = run(data)
    assert found.quality.top1.value == 1
    assert found.quality.confusion.diagonal().tolist() == [1, 1, 2]


def test_data_may_lack_classes_of_the_model():
    found = run(Tiles(["blue", "blue"], ("blue",)))
    assert (found.quality.top1.value, found.quality.per_class[:2]) == (1, (None, None))


def test_pixels_are_those_of_serving():
    runner, data = Palette(), Tiles(["red", "blue"], size=(33, 21))
    how = Preprocess((24, 16), crop_pct=0.7)
    evaluate(runner, data, tuple(COLOURS), how)
    expected = np.stack([preprocess(data.image(i), how) for i in range(2)])
    np.testing.assert_array_equal(runner.batches[0], expected)


def test_batches_are_as_asked_and_the_last_one_smaller():
    runner = Palette()
    evaluate(runner, Tiles(["red"] * 7), tuple(COLOURS), HOW, batch=3)
    assert [len(pixels) for pixels in runner.batches] == [3, 3, 1]


def test_a_broken_image_is_told_once_and_left_out():
    told, progress = [], []
    data = Tiles(["red", None, "blue", "green"])
    found = run(data, batch=2, tell=told.append, progress=progress.append)
    assert told == ["skipped: tile 1: is broken."]
    assert found.skipped == {"tile 1": "tile 1: is broken."}
    assert (found.quality.images, found.quality.top1.value) == (3, 1)
    assert progress == [2, 2]


def test_an_image_too_thin_to_resize_counts_as_broken():
    told = []
    with pytest.raises(ImageError, match="none of the 1 images"):
        run(Tiles(["red"], size=(2, 200_000)), how=HOW.at((512, 512)), tell=told.append)
    assert told[0].startswith("skipped: tile 0: too long and thin")


def test_a_batch_of_broken_images_runs_nothing():
    runner = Palette()
    data = Tiles([None, None, "red"])
    evaluate(runner, data, tuple(COLOURS), HOW, batch=2, tell=lambda _: None)
    assert [len(pixels) for pixels in runner.batches] == [1]


def test_nothing_that_can_be_read_is_an_error():
    with pytest.raises(ImageError, match="none of the 2 images can be read"):
        run(Tiles([None, None]), tell=lambda _: None)


def test_without_anyone_to_tell_the_log_has_it(caplog):
    with caplog.at_level(logging.WARNING, "coat_deploy"):
        run(Tiles(["red", None]))
    assert caplog.messages == ["skipped: tile 1: is broken."]


@pytest.mark.parametrize(("limit", "shown"), [(1, [0]), (3, [0, 3, 6]), (99, list(range(10)))])
def test_a_limit_takes_images_evenly_spread(limit, shown):
    data = Tiles(["red"] * 10)
    assert run(data, limit=limit).quality.images == len(shown)
    assert data.shown == shown


def test_a_class_that_the_model_lacks_is_told_before_any_image_is_read():
    data = Tiles(["blue", "mauve"], ("blue", "mauve", "pink"))
    with pytest.raises(UsageError) as raised:
        run(data, subject="photos/")
    message = str(raised.value)
    assert message.startswith("photos/: class 'mauve'")
    assert "'red', 'green', 'blue'" in message
    assert data.shown == []


def test_a_class_without_images_may_be_any():
    assert run(Tiles(["blue"], ("blue", "mauve"))).quality.images == 1


def test_json_has_figures_at_the_top_and_speed_beside():
    found = run(Tiles(["red", None, "blue"]), tell=lambda _: None)
    document = found.to_json()
    assert (document["top1"], document["images"], len(document["skipped"])) == (1, 2, 1)
    assert document["images_per_second"] == 2 / document["seconds"]
