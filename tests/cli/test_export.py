import json

import pytest

from coat_deploy.cli.export import describe_download


def test_an_export_leaves_artifact_proof_weights_and_manifest(cli, bare):
    ran = cli("export", "coat_lite_toy", "--weights", "random:1", "--models", bare, "--json")
    assert (ran.status, ran.err) == (0, "")
    folder = bare / "coat_lite_toy"
    assert ran.json["artifact"] == str(folder / "1" / "onnxruntime-fp32.onnx")
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "onnxruntime-fp32.onnx",
        "onnxruntime-fp32.proof.npz",
    ]
    assert ran.json["agreement"]["source"] == "synthetic"
    assert ran.json["agreement"]["max_abs_difference"] < 1e-4


def test_the_table_tells_artifact_and_agreement(cli, models):
    ran = cli("export", "coat_lite_toy", "--models", models)
    assert (ran.status, ran.err) == (0, "")
    assert f"{models}/coat_lite_toy/1/onnxruntime-fp32.onnx\n" in ran.out
    assert "on 8 synthetic images\n" in ran.out
    assert "100.00%\n" in ran.out


def test_photographs_are_what_it_is_validated_on(cli, models, photos):
    ran = cli("export", "coat_lite_toy", "--models", models, "--images", photos, "--json")
    agreement = ran.json["agreement"]
    assert (agreement["source"], agreement["images"]) == ("images", 13)


def test_without_validation_the_proof_alone_is_replayed(cli, models):
    ran = cli("export", "coat_lite_toy", "--models", models, "--no-validate", "--json")
    assert (ran.status, ran.json["agreement"]) == (0, {})
    assert cli("selftest", "coat_lite_toy", "--models", models).status == 0
    assert "not validated" in cli("export", "coat_toy", "--models", models, "--no-validate").out


def test_an_artifact_below_the_bar_is_not_written(cli, models):
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    words = ("--size", "96", "--max-abs-difference", "0", "--json")
    ran = cli("export", "coat_lite_toy", "--models", models, *words)
    assert (ran.status, ran.out) == (3, "")
    assert ran.err.count("\n") == 1
    assert {path: path.read_bytes() for path in models.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("size", ["dynamic", "96x64"])
def test_a_size_of_its_own_goes_into_the_name(size, cli, models):
    ran = cli("export", "coat_lite_toy", "--models", models, "--size", size, "--json")
    assert ran.status == 0
    assert ran.json["name"] == f"onnxruntime-fp32-{size}"
    assert ran.json["size"] == (None if size == "dynamic" else [96, 64])


def test_a_model_can_be_written_by_another_name_and_classifier(cli, models, tmp_path):
    (tmp_path / "names.txt").write_text("yes\nno\n\n")
    words = ("--as", "mine", "--labels", tmp_path / "names.txt", "--weights", "random")
    ran = cli("export", "coat_lite_toy", "--models", models, *words, "--json")
    assert ran.status == 0, ran.err
    spec = json.loads((models / "mine" / "config.json").read_text())
    assert (spec["num_classes"], spec["label_names"]) == (2, ["yes", "no"])


def test_feature_maps_have_no_top1(cli, models):
    ran = cli("export", "coat_toy", "--models", models, "--features", "--json")
    assert ran.status == 0
    assert ran.json["name"] == "onnxruntime-fp32-features"
    assert ran.json["agreement"]["top1_agreement"] is None


@pytest.mark.parametrize(
    ("total", "text"), [(4 << 20, "a.pth 1.0 of 4.0 MiB"), (None, "a.pth 1.0 MiB")]
)
def test_downloads_are_told_in_mib(total, text):
    assert describe_download("a.pth", 1 << 20, total) == text


def test_weights_given_anew_are_told_with_what_is_stale(cli, models):
    ran = cli("export", "coat_lite_toy", "--weights", "random:3", "--models", models)
    assert ran.status == 0
    assert "to be exported again: openvino-fp32" in ran.err
    assert "random:3" in ran.out


AUTO = ("--precision", "auto", "--threads", "1")


@pytest.mark.usefixtures("two_precisions")
def test_a_precision_chosen_by_measuring_is_told_with_all_that_were_compared(cli, models):
    ran = cli("export", "coat_lite_toy", "--models", models, *AUTO)
    assert (ran.status, ran.err) == (0, "")
    _, _, table, reasons = ran.out.split("\n\n")
    title, head, *rows = table.splitlines()
    assert title == "Measured at batch 1, 64x64, 1 thread:"
    assert head.split("  ")[0] == "precision"
    assert [row.split()[0] for row in rows] == ["fp32", "bf16"]
    assert sum(row.endswith("  chosen") for row in rows) == 1
    assert [line.split()[0] for line in reasons.splitlines()] == ["fp32:", "bf16:"]


@pytest.mark.usefixtures("two_precisions")
def test_limits_of_the_bar_hold_for_every_precision(cli, models):
    words = ("--max-abs-difference", "1e-12", "--json")
    ran = cli("export", "coat_lite_toy", "--models", models, *AUTO, *words)
    assert (ran.status, ran.out) == (3, "")
    assert "fp32: " in ran.err and "bf16: " in ran.err and ran.err.count("\n") == 1


def test_one_precision_alone_is_told_without_a_measurement(cli, models, monkeypatch):
    from coat_deploy.backends.select import PRECISIONS

    monkeypatch.setitem(PRECISIONS, "onnxruntime", ("fp32",))
    ran = cli("export", "coat_lite_toy", "--models", models, *AUTO)
    assert "Nothing to measure against:\n" in ran.out
    assert ran.out.endswith("fp32:  the only one that passes\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--no-validate",), "cannot be chosen without validation"),
        (("--min-top1-agreement", "2"), "'min_top1_agreement' cannot be (got 2.0"),
        (("--target", "eager"), "unknown target to export to 'eager'"),
    ],
)
def test_what_leaves_nothing_to_choose_by_is_refused(cli, models, words, message):
    ran = cli("export", "coat_lite_toy", "--models", models, *AUTO, *words)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert message in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("validate", "coat_lite_toy", "--images", ".", "--precision", "auto"),
        ("evaluate", "coat_lite_toy", "--data", ".", "--precision", "auto"),
        ("predict", "coat_lite_toy", ".", "--precision", "auto"),
        ("bench", "coat_lite_toy", "--targets", "onnxruntime:auto"),
    ],
    ids=lambda words: words[0],
)
def test_only_an_export_chooses(cli, models, photos, words):
    words = [photos if word == "." else word for word in words]
    ran = cli(*words, "--models", models)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "unknown precision" in ran.err and "'auto' (known: fp32" in ran.err


def test_fp16_for_a_gpu_is_exported_and_proven_on_a_cpu(cli, models):
    words = ("--models", models, "--precision", "fp16", "--json")
    ran = cli("export", "coat_toy", *words)
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["agreement"]["computed_by"] == "onnxruntime"
    folder = models / "coat_toy" / "1"
    assert {path.name for path in folder.glob("*fp16*")} == {
        "onnxruntime-fp16.onnx", "onnxruntime-fp16.proof.npz",
    }  # fmt: skip
    assert not list(folder.glob("emulated*"))


def test_fp16_on_a_cpu_is_refused_in_a_line_and_fp32_is_taken_by_itself(cli, models, photos):
    assert cli("export", "coat_toy", "--models", models, "--precision", "fp16").status == 0
    image = next(photos.iterdir())
    there = ("--models", models, "--target", "onnxruntime")
    assert cli("predict", "coat_toy", image, *there).status == 0
    ran = cli("predict", "coat_toy", image, *there, "--precision", "fp16")
    assert ran.status == 1 and "fp16 is for an NVIDIA GPU" in ran.err and ran.err.count("\n") == 1
    tested = cli("selftest", "coat_toy", "--models", models, "--json")
    assert tested.status == 0
    passed = {a["artifact"]: a["passed"] for a in tested.json["artifacts"]}
    assert passed["onnxruntime-fp16"] is None and passed["onnxruntime-fp32"] is True
