import dataclasses
import json

import pytest

from coat_deploy.cli.contenders import Entry
from coat_deploy.errors import UsageError
from coat_deploy.model import Model
from coat_deploy.runner import LoadOptions

pytestmark = pytest.mark.usefixtures("brief")

QUICK = ("--budget", "0.1", "--threads", "1")


@pytest.mark.slow
def test_three_targets_at_two_batch_sizes_in_one_run(cli, bare, tmp_path):
    """From a model without weights or artifacts; records and a picture are kept."""
    record, plot = tmp_path / "results.jsonl", tmp_path / "results.svg"
    words = ("--targets", "eager,onnxruntime,openvino", "--batch", "1,2", "--json")
    keep = ("--record", record, "--plot", plot, "--weights", "random:0")
    ran = cli("bench", "coat_lite_toy", "--models", bare, *words, *keep, *QUICK)
    assert ran.status == 0, ran.err
    assert ran.err.splitlines() == [
        "onnxruntime: not exported yet; exporting it.",
        "openvino: not exported yet; exporting it.",
    ]
    results = ran.json["results"]
    assert [(r["target"], r["batch"]) for r in results] == [
        (target, batch) for batch in (1, 2) for target in ("eager", "onnxruntime", "openvino")
    ]
    for result in results:
        assert 0 < result["p50_ms"] <= result["p90_ms"] <= result["p99_ms"]
        assert result["images_per_second"] == pytest.approx(
            result["batch"] / result["p50_ms"] * 1e3
        )
        assert result["peak_memory_mib"] > 10
        assert result["baseline"] == "eager"
        assert (result["ratio"] == 1) == (result["target"] == "eager")
        assert (result["agreement"] is None) == (result["target"] == "eager")
    assert ran.json["failures"] == []
    assert ran.json["machine"]["versions"]["onnxruntime"]
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["name"], line["p50_ms"]) for line in lines] == [
        (result["name"], result["p50_ms"]) for result in results
    ]
    assert all(line["model"] == "coat_lite_toy" and line["machine"] for line in lines)
    assert plot.read_text().lstrip().startswith("<?xml")


def test_a_contender_that_fails_does_not_stop_the_others(cli, models, damage):
    damage(models / "coat_lite_toy", "head", "openvino")
    words = ("--targets", "openvino,onnxruntime", "--batch", "2")
    ran = cli("bench", "coat_lite_toy", "--models", models, *words, *QUICK)
    assert ran.status == 1
    title = "coat_lite_toy, batch 2, 64x64, 1 thread: "
    assert ran.out.startswith(title)
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith("o")] == ["onnxruntime"] * 2
    first, second = ran.err.splitlines()
    assert first.startswith("openvino, batch 2: ") and "not the one that was exported" in first
    assert second == "coat-deploy: bench: could not be measured: openvino. The others are above."


def test_all_failing_is_one_line(cli, models, damage):
    damage(models / "coat_lite_toy", "head")
    ran = cli("bench", "coat_lite_toy", "--models", models, "--targets", "onnxruntime", *QUICK)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("coat-deploy: onnxruntime: ") and ran.err.count("\n") == 1


def test_a_stale_artifact_is_not_measured(cli, models):
    path = models / "coat_lite_toy" / "config.json"
    document = json.loads(path.read_text())
    document["pretrained_cfg"]["crop_pct"] = 1.0
    path.write_text(json.dumps(document))
    ran = cli("bench", "coat_lite_toy", "--models", models, "--targets", "onnxruntime", *QUICK)
    assert (ran.status, ran.out) == (1, "")
    assert "another config.json" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--baseline", "egar"), "Did you mean 'eager'?"),
        (("--targets", "onnxruntme"), "Did you mean 'onnxruntime'?"),
        (("--targets", "openvino:bf61"), "Did you mean 'bf16'?"),
        (("--targets", "onnxruntime:tracd"), "Did you mean 'traced'?"),
        (("--targets", "onnxruntime:bf16"), "unknown precision or form of onnxruntime 'bf16'"),
        (("--targets", "eager,eager"), "eager is named twice"),
        (("--targets", ","), "--targets: nothing given"),
        (("--batch", "0"), "--batch: must be 1 to 65536 (got 0)"),
        (("--batch", "one"), "--batch: must be whole numbers"),
        (("--threads", "0"), "--threads: must be 1 to 1024 (got 0)"),
        (("--size", "7"), "too small for coat_lite_toy"),
        (("--size", "0"), "size '0'"),
        (("--budget", "0"), "--budget"),
        (("--plot", "latency.pdf"), ".png or .svg"),
        (("--plot", "no/folder.png"), "no/folder.png: its folder does not exist"),
        (("--record", "no/folder.jsonl"), "no/folder.jsonl: its folder does not exist"),
        (("--record", "."), "is a folder"),
        (("--weights", "random"), "has weights already"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_measured(words, said, cli, models):
    ran = cli("bench", "coat_lite_toy", "--models", models, *words)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err and ran.err.count("\n") == 1


def test_weights_that_are_nowhere_are_asked_for(cli, bare):
    ran = cli("bench", "coat_lite_toy", "--models", bare, *QUICK)
    assert (ran.status, ran.out) == (2, "")
    assert "no weights" in ran.err
    assert not (bare / "coat_lite_toy" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("eager", ("eager", "fp32", None)),
        ("eager:compile", ("eager", "fp32", "compile")),
        ("eager:bf16", ("eager", "bf16", None)),
        ("eager:fused+compile:fp16", ("eager", "fp16", "fused+compile")),
        ("openvino:bf16:traced", ("openvino", "bf16", "traced")),
        ("openvino:traced:bf16", ("openvino", "bf16", "traced")),
    ],
)
def test_an_entry_names_target_precision_and_form_in_any_order(text, entry):
    found = Entry.parse(text)
    assert (found.target, found.precision, found.form) == entry


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("eager", LoadOptions()),
        ("eager:compile", LoadOptions(compile=True)),
        ("eager:fused", LoadOptions(fused=True, device="cuda")),
        ("eager:bf16", LoadOptions(precision="bf16", device="cuda")),
        (
            "eager:fp16:fused+compile",
            LoadOptions(precision="fp16", fused=True, compile=True, device="cuda"),
        ),
        ("openvino:bf16", LoadOptions()),
    ],
)
def test_what_pytorch_does_only_on_a_gpu_is_done_there(text, options):
    assert Entry.parse(text).options == options


def test_fused_without_a_gpu_fails_its_contender_alone(cli, models):
    from torch.cuda import is_available

    if is_available():
        pytest.skip("here is a GPU")
    words = ("--targets", "eager,eager:fp16:fused", "--json")
    ran = cli("bench", "coat_lite_toy", "--models", models, *words, *QUICK)
    assert ran.status == 1
    (failure,) = ran.json["failures"]
    assert (failure["name"], failure["precision"], failure["form"]) == (
        "eager:fp16:fused", "fp16", "fused",
    )  # fmt: skip
    assert "finds no NVIDIA GPU" in failure["error"]


def test_an_entry_has_one_precision():
    with pytest.raises(UsageError, match="fp32"):
        Entry.parse("openvino:bf16:fp32")


def test_a_missing_runtime_fails_its_contender_alone(cli, models, monkeypatch):
    from coat_deploy.backends import openvino

    monkeypatch.setattr(openvino, "missing", lambda: "pip install it")
    words = ("--targets", "onnxruntime,openvino", "--json")
    ran = cli("bench", "coat_lite_toy", "--models", models, *words, *QUICK)
    assert ran.status == 1
    assert [result["name"] for result in ran.json["results"]] == ["onnxruntime"]
    assert [failure["name"] for failure in ran.json["failures"]] == ["openvino"]
    assert "pip install it" in ran.json["failures"][0]["error"]


def test_an_export_for_the_bench_keeps_what_is_there(cli, models):
    words = ("--targets", "onnxruntime", "--size", "96x64", *QUICK)
    ran = cli("bench", "coat_lite_toy", "--models", models, *words)
    assert ran.status == 0, ran.err
    names = [artifact.name for artifact in Model(models / "coat_lite_toy").artifacts]
    assert names == ["onnxruntime-fp32", "openvino-fp32", "onnxruntime-fp32-96x64"]


def test_a_target_without_a_precision_is_its_first_not_what_happens_to_be_there():
    assert Entry.parse("openvino").query((64, 64)).precision == "fp32"
    assert Entry.parse("onnxruntime").query((64, 64)).form == "authored"


def test_a_model_given_by_its_path_is_exported_into_its_folder(cli, models):
    folder = str(models / "coat_lite_toy")
    words = ("--targets", "onnxruntime", "--size", "96", "--budget", "0.2", "--json")
    ran = cli("bench", folder, *words)
    assert ran.status == 0, ran.err
    assert (models / "coat_lite_toy" / "1" / "onnxruntime-fp32-96x96.onnx").is_file()


# On a GPU that is made up.


@pytest.fixture
def gpu(monkeypatch):
    """Let what is asked of a GPU be done by the CPU; return the options of every load."""
    from coat_deploy import open as opening
    from coat_deploy.backends import eager
    from coat_deploy.runner import LoadOptions

    monkeypatch.setattr(eager, "require_for", lambda options: None)
    asked = []
    load = opening.load_unchecked

    def load_here(target, path, options):
        asked.append((target, options.device, options.provider))
        return load(target, path, dataclasses.replace(options, device="cpu", provider=None))

    monkeypatch.setattr(opening, "load_unchecked", load_here)
    assert LoadOptions(device="cuda").device == "cuda"
    return asked


def line_up_on_a_gpu(models, names, **options):
    from coat_deploy.cli.contenders import line_up, read_entries
    from coat_deploy.repository import Repository

    repository = Repository.open(models)
    entries = read_entries(names)
    found = line_up(
        repository, repository.find("coat_lite_toy"), entries, (64, 64), None, **options
    )
    return found, entries


def test_contenders_are_loaded_on_the_device_and_say_so(models, gpu):
    lineup, entries = line_up_on_a_gpu(
        models, "eager,onnxruntime", device="cuda", provider="tensorrt"
    )
    assert gpu == [("onnxruntime", "cuda", "tensorrt")]
    contenders = list(lineup.contenders(entries, [1], [1]))
    assert [(c.name, c.device, c.labels["device"]) for c in contenders] == [
        ("eager", "cuda", "cuda"), ("onnxruntime", "cuda", "cuda"),
    ]  # fmt: skip
    options = [c.load.args[2] for c in contenders]
    assert [(o.device, o.provider) for o in options] == [("cuda", None), ("cuda", "tensorrt")]


def test_what_runs_on_the_cpu_alone_has_no_part_on_a_gpu(models, gpu):
    lineup, entries = line_up_on_a_gpu(models, "onnxruntime,openvino", device="cuda")
    assert lineup.failed["openvino"].startswith("openvino: runs on the CPU alone.")
    assert [f.device for f in lineup.failures(entries, [1], [1])] == ["cuda"]
    lineup, _ = line_up_on_a_gpu(models, "onnxruntime,openvino", device="cuda", optional=True)
    assert list(lineup.left_out) == ["openvino"] and not lineup.failed


def test_fp16_of_onnxruntime_has_no_part_on_a_cpu(models):
    lineup, _ = line_up_on_a_gpu(models, "onnxruntime,onnxruntime:fp16", optional=True)
    assert "is for an NVIDIA GPU" in lineup.left_out["onnxruntime:fp16"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "cudda"), "Did you mean 'cuda'?"),
        (("--provider", "tensorrt"), "Add --device cuda"),
        (("--device", "cuda", "--limits"), "--limits: measures the processor"),
    ],
)
def test_devices_that_cannot_be_are_told_before_anything_is_measured(words, said, cli, models):
    ran = cli("bench", "coat_lite_toy", "--models", models, *words)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err


def test_results_name_the_device(cli, models):
    ran = cli("bench", "coat_lite_toy", "--models", models, "--targets", "eager", "--json", *QUICK)
    assert [result["device"] for result in ran.json["results"]] == ["cpu"]
