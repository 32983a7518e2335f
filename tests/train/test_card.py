from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coat_deploy.measure.quality import Quality, QualityMeter
from coat_deploy.spec import ModelSpec, Preprocess, WeightsRecord
from coat_deploy.train.card import MAX_NAMES, MAX_ROWS, CardFacts, render_card
from coat_deploy.train.card_figures import count, duration, percent
from coat_deploy.train.card_metadata import dataset
from coat_deploy.train.recipe import Recipe, get_preset

yaml = pytest.importorskip("yaml")
markdown_it = pytest.importorskip("markdown_it")

LABELS = ("coat", "hat", "boot", "sock", "bag", "tie")
AWKWARD = (
    "cat | dog", "# x", "<b>", "猫 😀", "- list", "1. one", "_em_ *b* ~~s~~", "`code`", "a$b$",
    "http://x.org/a", "[a](b) ![c](d)", "&amp; \\| \\", "'quote\" : {yaml}", "---",
    "www.x.org", "a@b.org",
)  # fmt: skip


def quality(labels: tuple[str, ...], images: int = 120, unseen: int = 0) -> Quality:
    """Of a network that is mostly right; the last `unseen` classes have no image."""
    rng = np.random.default_rng(0)
    wanted = np.arange(images) % (len(labels) - unseen)
    logits = rng.normal(size=(images, len(labels))).astype(np.float32)
    logits[np.arange(images), wanted] += 3
    meter = QualityMeter(len(labels))
    meter.add(logits, wanted)
    found = meter.quality()
    assert found
    return found


def facts(labels: tuple[str, ...] = LABELS, **changes: Any) -> CardFacts:
    plain = CardFacts(
        name="clothes",
        spec=ModelSpec("coat_lite_nano", len(labels), 160, Preprocess((64, 64)), labels),
        labels=labels,
        parameters=914_123,
        macs=53_123_456,
        recipe=get_preset("small").replace({"epochs": 20, "flip": 0.0}),
        preset="small",
        weights=None,
        data="/home/jo/photos/clothing",
        train_images=2700,
        epochs=20,
        seconds=1023,
        machine="A processor, 2 cores",
        quality=quality(labels),
        history_picture="history.png",
        confusion_picture="confusion matrix.png",
        recipe_file="recipe.toml",
    )
    return replace(plain, **changes)


def head(card: str) -> dict[str, Any]:
    start, document, _ = card.split("---\n", 2)
    assert start == ""
    loaded = yaml.safe_load(document)
    assert isinstance(loaded, dict)
    return loaded


def body(card: str) -> str:
    return card.split("---\n", 2)[2]


def tokens(card: str) -> list[Any]:
    return markdown_it.MarkdownIt("commonmark").enable("table").parse(body(card))


def tables(card: str) -> list[list[list[str]]]:
    """Every table of a card as a reader sees it, the cells' text without any markup."""
    found: list[list[list[str]]] = []
    for token in tokens(card):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level > 2:
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def table(card: str, first: str) -> list[list[str]]:
    """The rows below the head of the table whose first column is called `first`."""
    return next(rows[1:] for rows in tables(card) if rows[0][0] == first)


def shown_facts(card: str) -> dict[str, str]:
    return {row[0]: row[1] for rows in tables(card) if rows[0][0] == "" for row in rows[1:]}


def test_the_head_files_the_model_on_the_hub():
    found = facts()
    document = head(render_card(found))
    index = document.pop("model-index")
    assert document == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "coat", "vision-transformer", "timm", "coat-deploy"],
        "metrics": ["accuracy"],
    }
    (result,) = index[0]["results"]
    assert index[0]["name"] == "clothes"
    assert result["dataset"] == {"name": "clothing", "type": "imagefolder", "split": "validation"}
    assert [metric["type"] for metric in result["metrics"]] == ["accuracy", "accuracy"]
    assert result["metrics"][0]["value"] == pytest.approx(found.quality.top1.value, abs=1e-6)


def test_the_hubs_own_client_accepts_the_head():
    hub = pytest.importorskip("huggingface_hub")
    found = facts(data="hub:me/clothes:small", license="apache-2.0")
    data = hub.ModelCard(render_card(found)).data
    assert (data.license, data.datasets, data.model_name) == (
        "apache-2.0",
        ["me/clothes"],
        "clothes",
    )
    first = data.eval_results[0]
    assert (first.task_type, first.dataset_type) == ("image-classification", "me/clothes")
    assert first.metric_value == pytest.approx(found.quality.top1.value, abs=1e-6)
    again = hub.ModelCardData(**data.to_dict(), ignore_metadata_errors=False)
    assert again.to_dict()["library_name"] == "timm"


def test_a_network_that_timm_knows_is_filed_under_timm():
    spec = ModelSpec("coat_lite_mini", 6, 512, Preprocess((224, 224)), LABELS)
    card = render_card(facts(spec=spec, weights=WeightsRecord("timm", sha256="ab" * 32)))
    document = head(card)
    assert document["library_name"] == "timm" and "timm" in document["tags"]
    assert document["base_model"] == "timm/coat_lite_mini.in1k"
    assert "timm.create_model('local-dir:./clothes', pretrained=True)" in card
    assert shown_facts(card)["Began from"] == "timm (sha256 abababababab)"
    assert "under Apache-2.0" in card


def test_a_network_that_timm_does_not_know_is_not_offered_to_it():
    spec = ModelSpec("coat_lite_mini", 6, 512, Preprocess((224, 224)), LABELS)
    card = render_card(facts(spec=replace(spec, model_args={"crpe": False})))
    assert head(card)["library_name"] == "coat-deploy"
    assert "create_model" not in card
    assert "timm does not know this network" in card


def test_without_validation_images_no_accuracy_is_claimed():
    card = render_card(facts(quality=None, confusion_picture=None))
    assert "model-index" not in head(card)
    assert "Not measured" in card and "Its accuracy is not known" in card
    assert shown_facts(card)["Measured on"] == "nothing"


def test_no_licence_is_made_up():
    assert "license" not in head(render_card(facts()))
    assert "No licence is stated yet" in render_card(facts())
    stated = render_card(facts(license="mit"))
    assert head(stated)["license"] == "mit" and "No licence" not in stated


def test_the_network_and_its_training_are_described():
    shown = shown_facts(render_card(facts()))
    assert shown["Architecture"].startswith("coat_lite_nano (CoaT-Lite")
    assert "not one of the paper" in shown["Architecture"]
    assert (shown["Parameters"], shown["MACs an image"]) == ("0.914 M", "53.1 M")
    assert shown["Input"] == "RGB, 64x64, bicubic, crop 0.9 (center)"
    assert (shown["Trained on"], shown["Measured on"]) == ("2700 images", "120 images")
    assert (shown["Began from"], shown["Epochs"]) == ("scratch", "20 of 20")
    assert (shown["Time"], shown["Machine"]) == ("17 min", "A processor, 2 cores")


def test_a_stream_and_several_processes_are_told():
    shown = shown_facts(render_card(facts(train_images=None, processes=4)))
    assert shown["Trained on"] == "a stream"
    assert shown["Machine"] == "A processor, 2 cores, 4 processes"


def test_the_epoch_that_was_kept_is_told_where_it_is_not_the_last():
    stopped = facts(
        recipe=get_preset("small").replace({"patience": 3, "epochs": 180}), kept_epoch=15
    )
    assert shown_facts(render_card(stopped))["Epochs"] == "20 of 180, of which epoch 15 was kept"
    assert shown_facts(render_card(facts(kept_epoch=20)))["Epochs"] == "20 of 20"


def test_parts_left_out_of_the_network_are_told():
    spec = replace(facts().spec, model_args={"crpe": False, "co_scale": "none"})
    assert shown_facts(render_card(facts(spec=spec)))["Departs from it"] == (
        "without CRPE, co_scale none"
    )


def test_the_recipe_shows_only_what_departs_from_its_preset():
    rows = table(render_card(facts()), "field")
    usual = str(get_preset("small").epochs)
    assert [row[:3] for row in rows] == [["epochs", "20", usual], ["flip", "0.0", "0.5"]]


def test_a_preset_as_it_is_has_no_table():
    card = render_card(facts(recipe=get_preset("small")))
    assert "The recipe is the preset `small`, unchanged ([the whole recipe](recipe.toml))." in card
    assert all(rows[0][0] != "field" for rows in tables(card))


def test_without_a_preset_the_authors_recipe_is_the_measure():
    card = render_card(facts(preset=None, recipe=Recipe().replace({"mixup": 0.1})))
    assert "What departs from the authors' recipe for ImageNet" in card
    assert [row[:3] for row in table(card, "field")] == [["mixup", "0.1", "0.8"]]


def test_results_have_their_intervals():
    found = facts()
    rows = {row[0]: row[1:] for row in table(render_card(found), "measure")}
    top1 = found.quality.top1
    assert rows["top-1"] == [f"{top1.value:.1%}", f"{top1.low:.1%} to {top1.high:.1%}"]
    assert rows["calibration error"][0] == f"{found.quality.calibration_error:.1%}"
    assert rows["negative log-likelihood"][0] == f"{found.quality.nll:.3f}"


def test_of_five_classes_no_top5_is_told():
    card = render_card(facts(LABELS[:5]))
    assert "top-5" not in card


def test_every_class_has_its_images_and_those_right():
    found = facts()
    rows = table(render_card(found), "class")
    shares = found.quality.per_class
    assert [row[0] for row in rows] == list(LABELS)
    assert [row[1:3] for row in rows] == [[str(s.total), str(s.correct)] for s in shares]


def test_of_many_classes_the_least_known_are_told():
    labels = tuple(f"class {i}" for i in range(MAX_NAMES + 30))
    found = facts(labels, quality=quality(labels, 3000))
    card = render_card(found)
    rows = table(card, "class")
    worst = sorted(share.value for share in found.quality.per_class)[:MAX_ROWS]
    assert [row[3] for row in rows] == [percent(value) for value in worst]
    assert "and 30 more, in `config.json`" in card


def test_pairs_that_are_confused_most_are_told():
    found = facts()
    first = found.quality.most_confused(1)[0]
    row = table(render_card(found), "most often")[0]
    assert row == [LABELS[first.label], LABELS[first.predicted], str(first.images)]


def test_pictures_are_embedded_by_relative_addresses():
    pictures = [
        child.attrs["src"]
        for token in tokens(render_card(facts()))
        for child in token.children or ()
        if child.type == "image"
    ]
    assert pictures == ["history.png", "confusion%20matrix.png"]


def test_pictures_that_were_not_drawn_are_not_embedded():
    assert "![" not in render_card(facts(history_picture=None, confusion_picture=None))


def test_commands_are_quoted_for_the_shell():
    card = render_card(facts(name="my clothes; rm", data="hub:me/clothes"))
    assert "coat-deploy predict './my clothes; rm' photo.jpg" in card
    assert "--data hub:me/clothes\n" in card


def test_a_path_of_this_machine_is_not_published():
    for data in (
        "/home/jo/photos/clothing",
        "parquet:/home/jo/*.parquet",
        "webdataset:/home/jo/x.tar",
    ):
        card = render_card(facts(data=data, weights=WeightsRecord("/home/jo/w.pth")))
        assert "/home" not in card


def test_limits_name_few_images_and_classes_without_any():
    card = render_card(facts(quality=quality(LABELS, 50, unseen=1)))
    assert "measured on as few as 10 images" in card
    assert "1 of its classes had no image" in card


def test_an_epoch_chosen_by_the_validation_images_is_owned_up_to():
    chosen = facts(recipe=get_preset("small").replace({"patience": 3}))
    assert "flatter it" in render_card(chosen)
    assert "flatter it" not in render_card(facts())


def test_awkward_class_names_are_shown_as_they_are():
    card = render_card(facts(AWKWARD))
    assert [row[0] for row in table(card, "class")] == list(AWKWARD)
    listed = next(t.children for t in tokens(card) if t.content.startswith("In the order"))
    assert {child.type for child in listed} <= {"text"}
    assert (
        "".join(c.content for c in listed) == f"In the order of the logits: {', '.join(AWKWARD)}."
    )


def test_awkward_names_make_no_markup():
    plain = [token.type for token in tokens(render_card(facts(LABELS)))]
    awkward = facts(AWKWARD[:6], name="# <b> | `x`", data="/x/a | b # [c](d)", machine="<i>|*x*")
    assert [token.type for token in tokens(render_card(awkward))] == plain


@pytest.mark.parametrize("name", [*AWKWARD, "a: b", "no", "3", "*x", "&a", "\x85\x1b[1m", "\udcff"])
def test_the_head_is_yaml_whatever_a_model_is_called(name):
    document = head(render_card(facts(name=name, data=f"/x/{name.replace('/', '')}")))
    clean = name.replace("\x85\x1b", "\N{REPLACEMENT CHARACTER}")
    clean = clean.replace("\udcff", "\N{REPLACEMENT CHARACTER}")
    assert document["model-index"][0]["name"] == clean


def test_a_card_is_utf8_whatever_it_is_about():
    labels = ("\udcff", "a\nb", "c\x00d", "\ufffe")
    card = render_card(facts(labels))
    card.encode()
    assert [row[0] for row in table(card, "class")] == ["�", "a b", "c�d", "�"]


@pytest.mark.parametrize(
    ("source", "name", "kind"),
    [
        ("digits", "scikit-learn digits", "digits"),
        ("hub:me/clothes", "me/clothes", "me/clothes"),
        ("hub:me/clothes:small", "me/clothes", "me/clothes"),
        ("parquet:/a/b/train-*.parquet", "b", "parquet"),
        ("parquet:b.parquet", "b.parquet", "parquet"),
        ("webdataset:/a/b/{0..9}.tar", "{0..9}.tar", "webdataset"),
        ("/a/clothing-96/", "clothing-96", "imagefolder"),
        ("a:b", "a:b", "imagefolder"),
        ("/", "images", "imagefolder"),
    ],
)
def test_sources_are_named_without_their_place(source, name, kind):
    assert dataset(source) == (name, kind)


def test_this_folder_is_named_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    assert dataset(".") == ("photos", "imagefolder")


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (914_123, "0.914 M"), (5_500_000, "5.5 M"), (4_350_000_000, "4.35 G")],
)
def test_counts_have_three_digits(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.4, "9 s"), (1020, "17 min"), (11_520, "3 h 12 min")]
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_share_short_of_all_is_not_called_all():
    assert (percent(1.0), percent(0.9999)) == ("100.0%", ">99.9%")
