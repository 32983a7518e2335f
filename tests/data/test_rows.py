"""Images in rows, and streams of them."""

import logging

import pytest
from PIL import Image

from coat_deploy.data.classes import Classes
from coat_deploy.data.rows import RowStream, decode_cell
from coat_deploy.errors import ImageError, UsageError

BROKEN = b"\x89PNG\r\n\x1a\n cut short"


@pytest.fixture
def rows(encode):
    """Nine rows, of which 3, 4 and 8 are corrupt."""
    return [
        {
            "image": {"bytes": BROKEN if i in (3, 4, 8) else encode((i, 0, 0)), "path": f"{i}.png"},
            "label": "cat" if i % 2 else "dog",
        }
        for i in range(9)
    ]


@pytest.fixture
def stream(rows):
    """The rows, in later epochs turned by so many."""
    return RowStream(
        lambda epoch: iter(rows[epoch:] + rows[:epoch]),
        "image", "label", Classes.of({"cat": "cat", "dog": "dog"}), 9, "train",
    )  # fmt: skip


def reds(samples):
    """Which row each image came from: its colour."""
    return [sample.image.getpixel((1, 1))[0] for sample in samples]


def test_samples_have_an_image_its_class_and_its_name(stream):
    sample = next(stream.samples(0))
    assert (sample.image.mode, sample.label, sample.name) == ("RGB", 1, "train (0.png)")
    assert stream.label_names == ("cat", "dog")


def test_next_readable_image_stands_in_for_corrupt_ones(stream):
    assert reds(stream.samples(0)) == [0, 1, 2, 5, 5, 5, 6, 7]


def test_every_epoch_has_its_order(stream):
    assert reds(stream.samples(5)) == [5, 6, 7, 0, 0, 1, 2]


@pytest.mark.parametrize("skip", range(9))
def test_skipping_replays_the_rest_exactly(stream, skip):
    assert reds(stream.samples(0, skip=skip)) == reds(stream.samples(0))[skip:]


@pytest.mark.parametrize("shard", range(2))
@pytest.mark.parametrize("skip", range(3))
def test_shards_take_turns(stream, shard, skip):
    places = range(shard + 2 * skip, 9, 2)
    readable = [i for i in places if i not in (3, 4, 8)]
    expected = [next((r for r in readable if r >= i), None) for i in places]
    samples = stream.samples(0, shard=shard, shards=2, skip=skip)
    assert reds(samples) == [i for i in expected if i is not None]


def test_corrupt_images_are_told_once(stream, caplog):
    for epoch in range(3):
        list(stream.samples(epoch))
    told = [record.getMessage() for record in caplog.records]
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    # 3 and 4 have the same bytes and other paths.
    assert [message.split(":")[1] for message in told] == [
        " train (3.png)", " train (4.png)", " train (8.png)",
    ]  # fmt: skip


def test_nothing_but_corrupt_images_yields_nothing(stream, rows):
    for row in rows:
        row["image"]["bytes"] = BROKEN
    assert list(stream.samples(0)) == []


def test_label_that_is_no_class_ends_the_stream(stream, rows):
    rows[2]["label"] = "cot"
    with pytest.raises(UsageError, match=r"train \(2\.png\): class 'cot' .*mean 'cat'"):
        list(stream.samples(0))


def test_image_without_a_path_goes_by_its_place(stream, rows):
    rows[1]["image"]["path"] = None
    rows[2]["image"] = rows[2]["image"]["bytes"]
    names = [sample.name for sample in stream.samples(1)]
    assert names[:2] == ["train, image 0 of epoch 1", "train, image 1 of epoch 1"]


def test_cell_may_hold_bytes_or_name_a_file(encode, tmp_path):
    (tmp_path / "1.png").write_bytes(encode((9, 0, 0)))
    path = str(tmp_path / "1.png")
    for cell in (encode((9, 0, 0)), {"bytes": None, "path": path}, {"path": path}):
        assert decode_cell(cell, "row").getpixel((1, 1)) == (9, 0, 0)


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}])
def test_empty_cell_is_named(cell):
    with pytest.raises(ImageError, match=r"^train\[3\]: holds no image"):
        decode_cell(cell, "train[3]")


def test_missing_file_is_an_image_at_fault(tmp_path):
    with pytest.raises(ImageError, match=r"^train\[3\]: "):
        decode_cell({"path": str(tmp_path / "gone.png")}, "train[3]")


def test_address_is_fetched_only_where_that_is_wanted(encode):
    cell = {"bytes": None, "path": "zip://1.png::hf://datasets/a/b/x.zip"}
    with pytest.raises(ImageError, match=r"^train\[3\]: lies elsewhere"):
        decode_cell(cell, "train[3]")
    asked = []

    def fetch(address):
        asked.append(address)
        return encode((9, 0, 0))

    assert isinstance(decode_cell(cell, "train[3]", fetch), Image.Image)
    assert asked == [cell["path"]]
