"""Parquet files and WebDataset tars, made and read on this machine alone."""

import io
import logging
import os
import pickle
import sys
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from coat_deploy.data.dataset import Dataset, Stream
from coat_deploy.data.options import DataOptions
from coat_deploy.data.sources import open_split, open_splits
from coat_deploy.errors import BackendMissing, ImageError, UsageError

STREAMED = DataOptions(streaming=True)


@pytest.fixture
def parquet(datasets, encode, tmp_path):
    """Write a split of so many images, of two classes in turn; return what to give to --data."""

    def parquet(split, count=12, start=0, name=None, types=None, **columns):
        classes = datasets.ClassLabel(names=["cat", "dog"])
        types = {"image": datasets.Image(), "label": classes} | (types or {})
        table = {
            "image": [
                {"bytes": encode((i, 0, 0)), "path": f"{i}.png"}
                for i in range(start, start + count)
            ],
            "label": [i % 2 for i in range(count)],
            **columns,
        }
        path = tmp_path / "tables" / f"{name or split}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_parquet(datasets, path, table, types)
        return f"parquet:{path.parent}"

    return parquet


def write_parquet(datasets, path, table, types):
    features = datasets.Features(
        {name: types.get(name, datasets.Value("string")) for name in table}
    )
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)
    datasets.enable_progress_bars()


@pytest.fixture
def tar(datasets, encode, tmp_path):
    """Write a tar of so many samples in WebDataset's form; return what to give to --data."""

    def tar(split, count=12, start=0):
        path = tmp_path / "tars" / f"{split}-000.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for i in range(start, start + count):
                for suffix, data in (("png", encode((i, 0, 0))), ("cls", b"%d" % (i % 3))):
                    info = tarfile.TarInfo(f"{i:04}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return f"webdataset:{path.parent}"

    return tar


def red(image):
    """Which image it is: its colour."""
    return image.getpixel((1, 1))[0]


def reds(samples):
    return [red(sample.image) for sample in samples]


def test_parquet_splits_are_told_by_file_name(parquet):
    parquet("train")
    splits = open_splits(parquet("validation", count=4, start=50))
    assert isinstance(splits.train, Dataset) and not isinstance(splits.train, Stream)
    assert (len(splits.train), len(splits.validation)) == (12, 4)
    assert splits.train.label_names == splits.validation.label_names == ("cat", "dog")
    assert splits.train.labels.tolist() == [0, 1] * 6
    assert splits.train.labels.dtype == np.int64
    assert [red(splits.validation.image(i)) for i in range(4)] == [50, 51, 52, 53]
    assert splits.validation.image(0).mode == "RGB"
    assert splits.validation.name(2) == "validation[2] (52.png)"


def test_share_is_held_back_of_a_lone_file(parquet):
    source = parquet("train", count=20)
    options = DataOptions(validation_share=0.2)
    splits = open_splits(source, options)
    assert np.bincount(splits.validation.labels).tolist() == [2, 2]
    images = [
        red(part.image(i)) for part in (splits.train, splits.validation) for i in range(len(part))
    ]
    assert sorted(images) == list(range(20))
    again = open_split(source, "validation", options)
    assert [again.name(i) for i in range(4)] == [splits.validation.name(i) for i in range(4)]
    assert len(open_split(source)) == 20


def test_split_is_measured_by_name(parquet):
    for split, count in (("train", 12), ("val", 4), ("test", 2)):
        source = parquet(split, count)
    assert [len(open_split(source, split)) for split in (None, "test", "train")] == [4, 2, 12]


def test_orientation_of_the_camera_is_applied(parquet, encode):
    data = encode(size=(8, 6), form="JPEG", orientation=6)
    rows = [{"bytes": data, "path": "tilted.jpg"}] * 12
    source = parquet("train", image=rows)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape == (8, 6, 3)
    assert (np.asarray(open_split(source).image(0)) == expected).all()
    parquet("test")
    sample = next(open_splits(source, STREAMED).train.samples(0))
    assert (np.asarray(sample.image) == expected).all()


def test_corrupt_image_is_found_when_it_is_asked_for(parquet):
    rows = [{"bytes": b"\x89PNG\r\n\x1a\n cut short", "path": f"{i}.png"} for i in range(12)]
    dataset = open_split(parquet("train", image=rows))
    with pytest.raises(ImageError, match=r"^train\[7\] \(7\.png\): the PNG image is damaged"):
        dataset.image(7)


def test_plain_bytes_and_texts_do_without_types_of_their_own(datasets, encode, tmp_path):
    table = {"picture": [encode((i, 0, 0)) for i in range(4)], "kind": ["dog", "cat", "cat", "dog"]}
    types = {"picture": datasets.Value("binary")}
    write_parquet(datasets, tmp_path / "x.parquet", table, types)
    dataset = open_split(f"parquet:{tmp_path / 'x.parquet'}")
    assert dataset.label_names == ("cat", "dog")
    assert dataset.labels.tolist() == [1, 0, 0, 1]
    assert dataset.name(3) == "train[3]"
    assert red(dataset.image(3)) == 3


def test_image_may_lie_in_a_file_of_its_own(parquet, encode, tmp_path):
    (tmp_path / "1.png").write_bytes(encode((99, 0, 0)))
    rows = [{"bytes": None, "path": str(tmp_path / "1.png")}] * 12
    assert red(open_split(parquet("train", image=rows)).image(0)) == 99


def test_nothing_is_fetched_for_a_file_on_this_machine(parquet, datasets):
    text, data = datasets.Value("string"), datasets.Value("binary")
    rows = [{"bytes": None, "path": "https://somewhere/1.png"}] * 12
    source = parquet("train", types={"image": {"bytes": data, "path": text}}, image=rows)
    with pytest.raises(ImageError, match="lies elsewhere"):
        open_split(source).image(0)


def test_path_with_the_signs_of_a_glob_is_a_path(parquet, tmp_path):
    parquet("train")
    os.rename(tmp_path / "tables", tmp_path / "tables [1]")
    assert len(open_split(f"parquet:{tmp_path / 'tables [1]'}")) == 12


def test_file_that_changed_is_read_anew(parquet, tmp_path):
    source = parquet("train")
    assert len(open_split(source)) == 12
    parquet("train", count=6)
    os.utime(tmp_path / "tables" / "train.parquet", (1, 1))
    assert len(open_split(source)) == 6


def test_classes_of_a_model_are_found_by_name(parquet):
    dataset = open_split(parquet("train"), None, DataOptions(label_names=("dog", "cow", "cat")))
    assert dataset.label_names == ("dog", "cow", "cat")
    assert dataset.labels.tolist() == [2, 0] * 6


def test_integers_are_places_among_a_models_names(parquet, datasets):
    source = parquet("train", types={"label": datasets.Value("int64")}, label=[2, 0] * 6)
    names = ("cat", "dog", "cow")
    assert open_split(source).label_names == ("0", "2")
    dataset = open_split(source, None, DataOptions(label_names=names))
    assert (dataset.label_names, dataset.labels[:2].tolist()) == (names, [2, 0])


def test_webdataset_is_read_by_its_suffixes(tar):
    tar("train")
    splits = open_splits(tar("val", count=6, start=30))
    assert splits.train.label_names == ("0", "1", "2")
    assert splits.train.labels.tolist() == [0, 1, 2] * 4
    assert [red(splits.validation.image(i)) for i in (0, 5)] == [30, 35]
    assert splits.train.name(3) == "train[3] (0003.png)"


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_stream_yields_every_image_once_in_each_epochs_own_order(kind, request):
    make = request.getfixturevalue(kind)
    make("train", 30)
    splits = open_splits(make("validation", 6), STREAMED)
    assert isinstance(splits.train, Stream)
    assert (splits.train.length, len(splits.validation)) == (30, 6)
    epochs = [reds(splits.train.samples(epoch)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != list(range(30))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_stream_depends_on_seed_and_epoch_alone(kind, request):
    make = request.getfixturevalue(kind)
    make("train", 30)
    source = make("validation", 6)
    first = open_splits(source, STREAMED).train
    whole = [reds(first.samples(epoch)) for epoch in (0, 1)]
    again = open_splits(source, STREAMED).train
    assert [reds(again.samples(epoch, skip=7)) for epoch in (1, 0)] == [whole[1][7:], whole[0][7:]]
    assert reds(again.samples(1, shard=1, shards=3, skip=2)) == whole[1][7::3]
    other = open_splits(source, DataOptions(streaming=True, seed=1)).train
    assert reds(other.samples(0)) != whole[0]


def test_stream_of_several_files_mixes_them(parquet):
    for i in range(3):
        parquet("train", 10, 10 * i, name=f"train-{i}")
    options = DataOptions(streaming=True, shuffle_buffer=10)
    splits = open_splits(parquet("test", 4), options)
    images = reds(splits.train.samples(0))
    assert sorted(images) == list(range(30))
    assert {image // 10 for image in images[:10]} == {0, 1, 2}


def test_stream_has_labels_of_the_same_classes(parquet, datasets):
    kinds, types = ["dog", "cat", "cow"] * 4, {"label": datasets.Value("string")}
    source = parquet("train", types=types, label=kinds)
    parquet("test", types=types, label=kinds)
    splits = open_splits(source, STREAMED)
    assert splits.train.label_names == splits.validation.label_names == ("cat", "cow", "dog")
    labels = {red(sample.image): sample.label for sample in splits.train.samples(0)}
    assert [labels[i] for i in range(3)] == [2, 0, 1]
    ours = open_splits(source, DataOptions(streaming=True, label_names=("dog", "cow", "cat")))
    assert ours.train.label_names == ours.validation.label_names == ("dog", "cow", "cat")
    labels = {red(sample.image): sample.label for sample in ours.train.samples(0)}
    assert [labels[i] for i in range(3)] == [0, 2, 1]
    assert ours.validation.labels[:3].tolist() == [0, 2, 1]


def test_stream_is_whole_inside_a_worker_of_a_data_loader(tar, monkeypatch):
    torch = pytest.importorskip("torch")
    for i in range(2):
        tar(f"train-{i}", 6, 6 * i)
    train = open_splits(tar("test"), STREAMED).train
    worker = type("Worker", (), {"id": 0, "num_workers": 2})
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: worker)
    assert sorted(reds(train.samples(0))) == list(range(12))


def test_splits_travel_to_other_processes(parquet):
    parquet("train", 30)
    source = parquet("test", 30, 50)
    for options in (DataOptions(), STREAMED):
        splits = pickle.loads(pickle.dumps(open_splits(source, options)))
        assert red(splits.validation.image(3)) == 53
    assert sorted(reds(splits.train.samples(0))) == list(range(30))


def test_images_are_read_by_several_threads_at_once(parquet):
    dataset = open_split(parquet("train", 60))
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda i: red(dataset.image(i % 60)), range(600)))
    assert images == list(range(60)) * 10


def test_length_of_a_stream_may_be_told(parquet):
    parquet("train")
    options = DataOptions(streaming=True, stream_length=5)
    assert open_splits(parquet("test"), options).train.length == 5


def test_streamed_source_is_measured_by_one_split_alone(parquet, tmp_path):
    source = parquet("train")
    parquet("validation", count=4)
    (tmp_path / "tables" / "train.parquet").write_bytes(b"never read")
    assert len(open_split(source, "validation", STREAMED)) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_is_printed_and_what_the_user_set_stays(parquet, library, streaming, capfd):
    source = parquet("train")
    parquet("validation")
    logging.getLogger("datasets").setLevel(logging.INFO)
    before = (
        library.are_progress_bars_disabled(),
        library.config.HF_HUB_OFFLINE,
        warnings.filters[:],
    )
    try:
        splits = open_splits(source, DataOptions(streaming=streaming))
        list(splits.train.samples(0)) if streaming else splits.train.image(0)
        assert logging.getLogger("datasets").level == logging.INFO
    finally:
        logging.getLogger("datasets").setLevel(logging.WARNING)
    after = library.are_progress_bars_disabled(), library.config.HF_HUB_OFFLINE, warnings.filters[:]
    assert before == after
    assert capfd.readouterr() == ("", "")


def refused(match, source, options=DataOptions()):  # noqa: B008
    with pytest.raises(UsageError, match=match) as caught:
        open_splits(source, options)
    assert "\n" not in str(caught.value)


def test_stream_without_a_split_to_measure_with_is_refused(parquet):
    refused(r"has no split to measure with.*\(got train\)", parquet("train"), STREAMED)


def test_unknown_split_is_told_with_those_there(parquet):
    source = parquet("train")
    parquet("test")
    refused("unknown split 'tst' .*mean 'test'", source, DataOptions(validation_split="tst"))
    with pytest.raises(UsageError, match=r"unknown split 'val' \(known: test, train\)"):
        open_split(source, "val")


def test_unknown_column_is_told(parquet):
    refused(r"\(train\): unknown column 'lbl'", parquet("train"), DataOptions(label_column="lbl"))


def test_images_without_a_label_are_refused(parquet):
    source = parquet("train")
    parquet("test", label=[0, 1, None] * 4)
    refused(r"\(test\): 4 of 12 images have no label \(row 2 holds None\)", source)


def test_class_without_images_in_one_split_is_named(parquet):
    source = parquet("train")
    parquet("validation", label=[0] * 12)
    refused("class 'dog' only in train", source)


def test_single_class_is_refused(parquet, datasets):
    one = {"label": datasets.ClassLabel(names=["cat"])}
    refused("only one class, 'cat'", parquet("train", types=one, label=[0] * 12))


def test_table_without_rows_is_refused(parquet, datasets, tmp_path):
    from pyarrow.parquet import ParquetWriter

    source = parquet("train")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    ParquetWriter(tmp_path / "tables" / "train.parquet", features.arrow_schema).close()
    refused(r"no images \(0 rows\)", source)


@pytest.mark.parametrize("streaming", [False, True])
def test_file_that_is_no_table_is_named(parquet, tmp_path, streaming, capfd):
    source = parquet("train")
    parquet("test")
    for file in (tmp_path / "tables").iterdir():
        file.write_bytes(b"no parquet")
    refused(r"^parquet:.*: cannot be read \(.*\)", source, DataOptions(streaming=streaming))
    assert capfd.readouterr() == ("", "")


def test_missing_package_is_told_with_the_command(parquet, monkeypatch):
    source = parquet("train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BackendMissing, match=r'pip install "coat-deploy\[datasets\]"'):
        open_splits(source)
