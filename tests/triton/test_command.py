"""What cannot be asked of `coat-deploy triton` is one clear line."""

import json
import shutil

import pytest

from coat_deploy.model import Model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accelerator", "cudda"), "unknown accelerator 'cudda' (known: cpu, openvino, cuda"),
        (("--target", "eager"), "target eager: Triton has no backend for it"),
        (("--target", "openvino"), "Take --target onnxruntime --accelerator openvino."),
        (("--target", "tensorrt-rtx"), "Take --target tensorrt, built on a GPU like"),
        (("--artifact", "onnxruntime-fp33"), "Did you mean 'onnxruntime-fp32'?"),
        (("--as", "a b"), "name 'a b': Triton does not serve it"),
        (("--as", "a/b"), "name 'a/b': Triton does not serve it"),
        (("--as", "../b"), "name '../b': Triton does not serve it"),
        (("--as", ""), "name '': Triton does not serve it"),
        (("--max-batch", 0), "max-batch: must be 1 or more (got 0)"),
        (("--instances", 0), "instances: must be 1 or more (got 0)"),
        (("--max-queue", 0), "max-queue: must be 1 or more (got 0)"),
        (("--decoders", -1), "decoders: must be 0 or more (got -1)"),
        (("--delay-us", -1), "delay-us: must be 0 or more (got -1)"),
        (("--accelerator", "cuda", "--threads", 2), "threads: are of the CPU"),
        (
            ("--accelerator", "tensorrt", "--artifact", "onnxruntime-fp32-dynamic"),
            "TensorRT would build an engine for every new image size",
        ),
        (("--also", "toy"), "--also: is for engines"),
    ],
)
def test_what_cannot_be_is_refused(triton, repository, words, message):
    ran = triton(*words)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert not repository.exists()


def test_a_model_without_the_artifact_is_told_how_to_export_it(triton):
    ran = triton("--target", "tensorrt")
    assert ran.status == 1
    assert "no artifact for tensorrt" in ran.err
    assert "coat-deploy export toy --target tensorrt" in ran.err
    assert ran.err.count("\n") == 1


def test_int8_is_served_image_by_image_as_it_was_validated(cli, triton, models, configs):
    assert cli("export", "toy", "--models", models, "--precision", "int8").status == 0
    assert triton("--precision", "int8").status == 0
    assert {config.max_batch_size for config in configs().values()} == {1}
    for words in (("--max-batch", 8), ("--accelerator", "cuda", "--max-batch", 1)):
        ran = triton("--precision", "int8", *words)
        assert ran.status == 2
        assert "was validated image by image on the CPU" in ran.err


def refused(ran, *parts):
    assert (ran.status, ran.out) == (2, "")
    assert all(part in ran.err for part in parts), ran.err
    assert ran.err.count("\n") == 1


def test_engines_must_be_of_one_network_and_of_different_gpus(triton, models, add_engine, tmp_path):
    one, other = models / "toy", tmp_path / "other" / "toy"
    shutil.copytree(one, other)
    add_engine(one)
    add_engine(other)
    words = ("--target", "tensorrt", "--also", other)
    refused(triton(*words), "a second engine for GPUs of compute capability 8.6")
    add_engine(other, "9.0", record={"version": "10.9"})
    refused(triton(*words), "not an engine of the same network", "version of TensorRT")
    add_engine(other, "9.0", weights_sha256="0" * 64)
    refused(triton(*words), "not an engine of the same network")


def test_what_an_engine_cannot_is_refused(triton, models, add_engine):
    from coat_deploy.engine import Profile

    add_engine(models / "toy")
    target = ("--target", "tensorrt")
    refused(triton(*target, "--max-batch", 64), "the engine takes less (got 64, expected 32")
    refused(triton(*target, "--accelerator", "cuda"), "is for graphs")
    refused(triton(*target, "--threads", 2), "threads: are of the CPU")
    only_eight = (Profile.of((8, 8, 8), (64, 96)),)
    add_engine(models / "toy", record={"profiles": only_eight})
    refused(triton(*target), "takes no single image", "Export it with --batch 1,8,8")
    add_engine(models / "toy", engine=None)
    ran = triton(*target)
    assert ran.status == 1
    assert "does not say what this engine is for" in ran.err


def test_a_model_without_a_classifier_and_labels_of_several_lines_are_refused(cli, triton, models):
    config = models / "toy" / "config.json"
    document = json.loads(config.read_text())
    document["label_names"][2] = "a coat\nof many colours"
    config.write_text(json.dumps(document))
    assert cli("export", "toy", "--models", models).status == 0
    ran = triton()
    assert ran.status == 1
    assert "label 2 cannot be a line of labels.txt (got 'a coat\\nof" in ran.err
    assert ran.err.count("\n") == 1
    assert Model(models / "toy").artifacts


def test_a_person_is_told_what_clients_call(triton):
    out = triton("--artifact", "onnxruntime-fp32-dynamic").out
    assert "toy        pixels (3, any, any)      logits (10)" in out
    assert "toy_image  image (an encoded image)  logits (10)" in out
