"""Engines, from the command line: TensorRT for RTX builds them on any machine."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("tensorrt_rtx")

from coat_deploy.backends import cuda  # noqa: E402
from coat_deploy.model import Model  # noqa: E402
from coat_deploy.network.weights import load_checkpoint  # noqa: E402

NO_GPU = pytest.mark.skipif(cuda.problem() is None, reason="there is a GPU")
NAME = "tensorrt-rtx-fp16"


def export(cli, models, *words, name="coat_lite_toy"):
    wanted = ("--target", "tensorrt-rtx", "--models", models)
    return cli("export", name, *wanted, *words)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_an_engine_is_exported_with_its_graph_log_proof_and_census(cli, models, precision):
    ran = export(cli, models, "--precision", precision, "--batch", "1,2,4", "--json")
    assert (ran.status, ran.err) == (0, "")
    folder, name = models / "coat_lite_toy" / "1", f"tensorrt-rtx-{precision}"
    assert ran.json["artifact"] == str(folder / f"{name}.engine")
    assert {path.name for path in folder.glob(f"{name}.*")} == {
        f"{name}.{kind}" for kind in ("engine", "onnx", "log", "proof.npz")
    }
    (profile,) = ran.json["engine"]["profiles"]
    assert (profile["batch"], profile["height"]) == ([1, 2, 4], [64, 64, 64])
    census = ran.json["census"]
    assert sum(v["layers"] for v in census["by_precision"].values()) == census["layers"]
    types = {"tf32": "fp32"}.get(precision, precision)
    assert census["by_precision"][types]["share"] > 0.8
    assert ran.json["agreement"]["top1_agreement"] is not None


@NO_GPU
def test_without_a_gpu_it_is_said_what_was_held_against_pytorch(cli, models):
    for precision in ("fp16", "bf16"):
        ran = export(cli, models, "--precision", precision, "--json")
        assert ran.status == 0, ran.err
        assert ran.json["agreement"]["computed_by"] == "onnxruntime"
    assert not list((models / "coat_lite_toy" / "1").glob("emulated*"))
    assert "by onnxruntime, its graph" in export(cli, models, "--precision", "fp16").out


def test_several_profiles_are_several_ranges(cli, models):
    words = ("--batch", "1", "--batch", "2,4,8", "--precision", "fp16", "--json")
    ran = export(cli, models, *words)
    assert [p["batch"] for p in ran.json["engine"]["profiles"]] == [[1, 1, 1], [2, 4, 8]]


def test_an_open_size_has_a_range_of_its_own(cli, models):
    words = ("--size", "dynamic", "--size-range", "32,64,128", "--batch", "2", "--json")
    ran = export(cli, models, *words)
    assert ran.status == 0, ran.err
    assert ran.json["engine"]["profiles"] == [
        {"batch": [2, 2, 2], "height": [32, 64, 128], "width": [32, 64, 128]}
    ]


def test_blocks_and_operators_that_stay_float32_are_recorded(cli, models):
    words = ("--keep-fp32", "serial_blocks2.0", "--islands", "Softmax", "--precision", "fp16")
    ran = export(cli, models, *words, "--json")
    assert ran.json["engine"]["options"] == {
        "keep_fp32": ["serial_blocks2.0"],
        "islands": ["Softmax"],
    }
    assert set(ran.json["census"]["by_stage"]["serial_blocks2"]) >= {"fp32"}
    assert set(ran.json["census"]["by_kind"]["normalization"]) == {"fp16", "fp32"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "4,2,8"), "--batch: must be least, best and largest, or one number"),
        (("--batch", "1,8"), "--batch: must be least, best and largest, or one number"),
        (("--batch", "0"), "--batch: must be 1 to 65536"),
        (("--size-range", "32,64,128"), "size range: the size is fixed"),
        (("--keep-fp32", "norm1"), "its graph is float32 altogether"),
        (("--precision", "fp16", "--keep-fp32", "serial_blocks2.9"), "Did you mean 'serial_blo"),
        (("--compute-capability", "3.5"), "does not build for 3.5 (known: "),
        (("--precision", "int8"), "unknown precision for tensorrt-rtx 'int8'"),
    ],
)
def test_what_cannot_be_asked_of_an_engine_is_refused(cli, models, words, message):
    ran = export(cli, models, *words)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_options_of_engines_are_refused_for_graphs(cli, models):
    ran = cli("export", "coat_lite_toy", "--models", models, "--batch", "8")
    assert ran.status == 2
    assert "Leave the options of engines out" in ran.err


@NO_GPU
def test_an_engine_is_not_used_where_there_is_no_gpu(cli, models, photos):
    assert export(cli, models, "--precision", "fp16").status == 0
    words = ("coat_lite_toy", photos, "--models", models, "--json")
    ran = cli("predict", *words, "--target", "tensorrt-rtx")
    assert (ran.status, ran.out) == (1, "")
    assert "needs an NVIDIA GPU, and there is no NVIDIA driver" in ran.err
    assert cli("predict", *words).json["target"] == "onnxruntime"
    results = cli("selftest", "coat_lite_toy", "--models", models, "--json").json
    (engine,) = (a for a in results["artifacts"] if a["artifact"] == NAME)
    assert results["passed"] and engine["passed"] is None
    assert "needs an NVIDIA GPU" in engine["error"]


def test_an_engine_of_another_version_is_not_loaded(cli, models, photos):
    assert export(cli, models, "--precision", "fp16", "--batch", "1,2,4").status == 0
    path = models / "coat_lite_toy" / "manifest.json"
    manifest = json.loads(path.read_text())
    (entry,) = (a for a in manifest["artifacts"] if a.get("engine"))
    entry["engine"]["version"] = "1.2.3"
    path.write_text(json.dumps(manifest))
    ran = cli("predict", "coat_lite_toy", photos, "--models", models, "--target", "tensorrt-rtx")
    assert ran.status == 1
    assert "it was built by TensorRT for RTX 1.2.3, and 1." in ran.err
    command = (
        "coat-deploy export coat_lite_toy --target tensorrt-rtx --precision fp16 --batch 1,2,4"
    )
    assert command in ran.err


# best


@pytest.mark.parametrize(
    ("factor", "kept"),
    [(1, None), (1e6, ["logits"]), (1e8, ["logits"])],
    ids=["nothing", "logits overflow", "weights overflow"],
)
def test_best_keeps_just_the_block_that_float16_cannot_hold(cli, bare, tmp_path, factor, kept):
    spec = Model(bare / "coat_lite_toy").spec
    tensors = load_checkpoint("random:0", spec).tensors
    head = np.float32(factor) * tensors["head.weight"]
    save_file({**tensors, "head.weight": head}, tmp_path / "wide.safetensors")
    # Not the last layer: as an island the head would hold anything.
    islands = ("--islands", "LayerNormalization,Softmax")
    words = ("--weights", tmp_path / "wide.safetensors", "--precision", "best", "--json")
    ran = export(cli, bare, *words, *islands)
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["name"] == NAME
    assert ran.json["engine"]["options"].get("keep_fp32") == kept
    (logits,) = ran.json["census"]["by_stage"]["logits"]
    assert logits == ("fp32" if kept else "fp16")


def test_best_of_what_cannot_be_is_below_the_bar(cli, models):
    words = ("--precision", "best", "--max-abs-difference", "0")
    ran = export(cli, models, *words)
    assert ran.status == 3
    assert "not even with every block in fp32" in ran.err


def test_best_is_for_engines(cli, models):
    ran = cli("export", "coat_lite_toy", "--models", models, "--precision", "best")
    assert ran.status == 2
    assert "unknown precision for onnxruntime 'best'" in ran.err


# inspect


def test_inspect_shows_an_engine(cli, models):
    assert export(cli, models, "--precision", "fp16", "--batch", "4").status == 0
    words = ("inspect", f"coat_lite_toy/{NAME}", "--models", models)
    shown, told = cli(*words), cli(*words, "--json").json
    assert shown.status == 0
    assert "layers of the engine" in shown.out
    assert told["inputs"] == {"pixels": [4, 3, 64, 64]}
    assert told["outputs"] == {"logits": [4, 10]}
    assert told["census"]["by_kind"]["softmax"] == {"fp32": 5}
    assert set(told["bytes"]) == {f"{NAME}.{k}" for k in ("engine", "onnx", "log", "proof.npz")}
    assert told["engine"]["profiles"][0]["batch"] == [4, 4, 4]


def test_inspect_shows_a_graph(cli, models):
    file = models / "coat_toy" / "1" / "onnxruntime-fp32.onnx"
    told = cli("inspect", file, "--json").json
    assert told["model"] == "coat_toy"
    assert told["inputs"] == {"pixels": ["batch", 3, 64, 64]}
    assert told["engine"] is None
    assert set(told["census"]["by_precision"]) == {"fp32"}
    assert "nodes of the graph" in cli("inspect", file).out


def test_inspect_counts_integers(cli, models):
    cli("export", "coat_lite_toy", "--models", models, "--precision", "int8", "--no-validate")
    told = cli("inspect", "coat_lite_toy/onnxruntime-int8", "--models", models, "--json").json
    assert set(told["census"]["by_precision"]) <= {"fp32", "int8"}


def test_inspect_shows_the_shapes_of_feature_maps(cli, models):
    words = ("--features", "--size", "dynamic", "--models", models)
    assert cli("export", "coat_toy", *words).status == 0
    name = "onnxruntime-fp32-dynamic-features"
    told = cli("inspect", f"coat_toy/{name}", "--models", models, "--json").json
    assert told["outputs"]["x2"] == ["batch", 24, "height/8", "width/8"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("coat_toy", "which artifact? (there: onnxruntime-fp32, openvino-fp32)"),
        ("coat_toy/onnxruntime-fp23", "Did you mean 'onnxruntime-fp32'?"),
        ("coat_nothing", "coat_nothing"),
    ],
)
def test_inspect_says_what_there_is(cli, models, what, message):
    ran = cli("inspect", what, "--models", models)
    assert ran.status != 0
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_inspect_of_a_file_of_no_artifact_says_so(cli, models):
    stray = models / "coat_toy" / "1" / "stray.onnx"
    stray.write_bytes(b"")
    ran = cli("inspect", stray)
    assert ran.status == 2
    assert "of no artifact of" in ran.err


def test_inspect_refuses_a_file_that_was_changed(cli, models):
    file = models / "coat_toy" / "1" / "onnxruntime-fp32.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    ran = cli("inspect", file)
    assert ran.status == 1
    assert "is not the one that was exported" in ran.err
