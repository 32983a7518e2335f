"""Columns by type and by name, on the types of the package datasets."""

import pytest

from coat_deploy.data.classes import Classes
from coat_deploy.data.columns import classify, find_image_column, find_label_column, spell
from coat_deploy.errors import UsageError


@pytest.fixture
def types(library):
    """One feature of each kind that counts."""
    value = library.Value
    return {
        "Image": library.Image(),
        "struct": {"bytes": value("binary"), "path": value("string")},
        "binary": value("large_binary"),
        "ClassLabel": library.ClassLabel(names=["cat", "dog"]),
        "int": value("int32"),
        "text": value("string"),
        "float": value("float32"),
        "list": library.List(value("int64")),
    }


def features(types, **columns):
    return {name: types[kind] for name, kind in columns.items()}


@pytest.mark.parametrize("kind", ["Image", "struct", "binary"])
def test_images_are_found_by_type_whatever_the_column_is_called(types, kind):
    assert find_image_column(features(types, label="int", x=kind), None, "data") == "x"


def test_image_type_goes_before_bytes(types):
    columns = features(types, image="binary", picture="Image", thumbnail="struct")
    assert find_image_column(columns, None, "data") == "picture"


@pytest.mark.parametrize("kind", ["ClassLabel", "int", "text"])
def test_labels_are_found_by_type_whatever_the_column_is_called(types, kind):
    assert find_label_column(features(types, image="Image", y=kind, z="float"), None, "data") == "y"


def test_class_labels_go_before_integers_and_texts(types):
    columns = features(types, label="int", kind="ClassLabel", name="text")
    assert find_label_column(columns, None, "data") == "kind"


def test_usual_name_decides_between_columns_of_a_type(types):
    columns = features(types, id="int", cls="int", txt="text", image="Image", other="Image")
    assert find_label_column(columns, None, "data") == "cls"
    assert find_image_column(columns, None, "data") == "image"


def test_columns_of_webdataset_itself_are_no_labels(types):
    columns = features(types, jpg="Image", kind="text", __key__="text", __url__="text")
    assert find_label_column(columns, None, "data") == "kind"


def test_named_column_is_taken(types):
    columns = features(
        types, coarse="ClassLabel", fine="ClassLabel", label="int", a="Image", b="Image"
    )
    assert find_label_column(columns, "fine", "data") == "fine"
    assert find_image_column(columns, "b", "data") == "b"


def test_several_that_would_do_are_named(types):
    columns = features(types, coarse="ClassLabel", fine="ClassLabel")
    with pytest.raises(
        UsageError,
        match=r"^data: several columns .* labels \(got 'coarse', 'fine'\).*--label-column",
    ):
        find_label_column(columns, None, "data")


def test_unknown_column_is_told_with_the_nearest(types):
    with pytest.raises(UsageError, match=r"^data: unknown column 'lable' .*Did you mean 'label'"):
        find_label_column(features(types, image="Image", label="int"), "lable", "data")


def test_named_column_of_another_type_is_refused(types):
    columns = features(types, image="Image", label="int", score="float")
    with pytest.raises(UsageError, match="column 'score' holds no labels"):
        find_label_column(columns, "score", "data")
    with pytest.raises(UsageError, match="column 'label' holds no images"):
        find_image_column(columns, "label", "data")


def test_missing_column_is_told_with_those_there(types):
    columns = features(types, score="float", boxes="list")
    with pytest.raises(
        UsageError, match=r"no column holds images \(got columns 'score', 'boxes'\)"
    ):
        find_image_column(columns, None, "data")


def test_class_label_brings_its_names(types):
    assert spell(types["ClassLabel"], [1, 1]) == {0: "cat", 1: "dog"}


def test_texts_are_classes_in_sorted_order(types):
    assert list(spell(types["text"], ["b", "a", None, "b"]).items()) == [("a", "a"), ("b", "b")]


def test_integers_are_classes_in_order_of_size(types):
    assert list(spell(types["int"], [10, 9, -1, 9]).items()) == [(9, "9"), (10, "10")]


def test_integers_are_places_among_a_models_names_unless_they_are_names(types):
    assert spell(types["int"], [1], ("cat", "dog")) == {0: "cat", 1: "dog"}
    assert spell(types["int"], [5], ("5", "7")) == {5: "5"}


def test_images_without_a_label_are_counted():
    classes = Classes.of({0: "cat", 1: "dog"})
    assert classify([1, 0, 1], classes, "data").tolist() == [1, 0, 1]
    with pytest.raises(UsageError, match=r"^data: 2 of 4 images have no label \(row 1 holds -1\)"):
        classify([0, -1, 1, None], classes, "data")


def test_no_rows_are_no_images():
    with pytest.raises(UsageError, match=r"^data: no images \(0 rows\)"):
        classify([], Classes.of({}), "data")
