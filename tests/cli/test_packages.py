"""Packages that AOTInductor compiles: one for all tests here, which takes a minute of a core."""

import functools
import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from coat_deploy.backends import aotinductor, eager  # noqa: E402
from coat_deploy.errors import (  # noqa: E402
    BackendMissing,
    CorruptArtifact,
    RunnerError,
    StaleArtifact,
    UsageError,
)
from coat_deploy.model import Model  # noqa: E402
from coat_deploy.open import Source, default_target, load_unchecked, open_source  # noqa: E402
from coat_deploy.runner import LoadOptions, TensorSpec  # noqa: E402

NAME = "aotinductor-fp32"
TARGET = ("--target", "aotinductor")
LITE = "coat_lite_toy"


@pytest.fixture
def mine(packaged, tmp_path):
    """A copy of it that the test may break."""
    return shutil.copytree(packaged, tmp_path / "packaged")


@pytest.fixture(scope="session")
def package(packaged):
    return packaged / LITE / "1" / f"{NAME}.pt2"


def draw(batch):
    random = np.random.Generator(np.random.PCG64(batch))
    return random.standard_normal((batch, 3, 64, 64)).astype(np.float32)


def edit(models, **changes):
    """Change the record of the package in the manifest."""
    path = models / LITE / "manifest.json"
    manifest = json.loads(path.read_text())
    (entry,) = (a for a in manifest["artifacts"] if a.get("package"))
    entry["package"] |= changes
    path.write_text(json.dumps(manifest))


# what it computes


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_package_computes_what_the_network_does(packaged, package, batch):
    pixels = draw(batch)
    options = LoadOptions(threads=1)
    with (
        eager.load(packaged / LITE, options) as network,
        aotinductor.load(package, options) as runner,
    ):
        expected, got = network.run(pixels)["logits"], runner.run(pixels)["logits"]
        bound = runner.bind(pixels)()[0].numpy()
    assert got.shape == (batch, 10) and got.dtype == np.float32
    assert np.abs(got - expected).max() < 1e-4
    assert np.array_equal(bound, got)


@pytest.mark.slow
def test_a_package_describes_itself(package):
    with aotinductor.load(package, LoadOptions()) as runner:
        assert runner.target == "aotinductor"
        assert runner.inputs == (TensorSpec("pixels", "float32", ("batch", 3, 64, 64)),)
        assert [spec.name for spec in runner.outputs] == ["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 64, 32), (0, 3, 64, 64), (3, 64, 64)])
def test_what_does_not_fit_is_refused(package, shape):
    with (
        aotinductor.load(package, LoadOptions()) as runner,
        pytest.raises(RunnerError, match=r"expected float32 \(B >= 1, 3, 64, 64\)"),
    ):
        runner.run(np.zeros(shape, np.float32))


@pytest.mark.slow
def test_calls_at_once_give_what_they_give_one_after_another(package):
    from concurrent.futures import ThreadPoolExecutor

    images = [draw(1), draw(2)]
    with aotinductor.load(package, LoadOptions(threads=2, streams=2)) as runner:
        alone = [runner.run(x)["logits"] for x in images]
        with ThreadPoolExecutor(2) as pool:
            rounds = [pool.map(lambda x: runner.run(x)["logits"], images) for _ in range(20)]
            together = [list(results) for results in rounds]
    for results in together:
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(results, alone, strict=True))


@pytest.mark.slow
def test_threads_are_those_of_the_run_not_of_the_compilation(package):
    script = (
        "import os, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from coat_deploy.backends.aotinductor import load\n"
        "from coat_deploy.runner import LoadOptions\n"
        "for threads in (1, 3):\n"
        "    runner = load(Path(sys.argv[1]), LoadOptions(threads=threads))\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    runner.run(np.zeros((4, 3, 64, 64), np.float32))\n"
        "    print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    command = [sys.executable, "-c", script, str(package)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    one, three = map(int, done.stdout.split())
    assert one == 0  # it was compiled with one, as all tests here run
    assert three >= 2


@pytest.mark.slow
def test_a_package_runs_without_our_code(package, tmp_path):
    np.save(tmp_path / "pixels.npy", draw(2))
    script = (
        "import sys, numpy, torch\n"
        "network = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "logits = network(torch.from_numpy(numpy.load('pixels.npy')))\n"
        "assert not any(name.startswith('coat_deploy') for name in sys.modules)\n"
        "numpy.save('logits.npy', logits.numpy())\n"
    )
    command = [sys.executable, "-c", script, str(package)]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path)
    with aotinductor.load(package, LoadOptions(threads=1)) as runner:
        expected = runner.run(draw(2))["logits"]
    assert np.allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-6)


# the command line


@pytest.mark.slow
def test_an_export_records_what_the_package_is_for(packaged):
    told = json.loads((packaged / "export.json").read_text())
    assert told["artifact"].endswith(f"/{LITE}/1/{NAME}.pt2")
    assert (told["form"], told["opset"], told["engine"]) == ("network", None, None)
    assert told["package"]["torch"] == torch.__version__
    assert told["package"]["device"] == "cpu"
    assert told["package"]["gpu"] is None
    assert told["agreement"]["max_abs_difference"] < 1e-4
    folder = packaged / LITE / "1"
    files = {path.name for path in folder.glob(f"{NAME}*")}
    assert files == {f"{NAME}.pt2", f"{NAME}.proof.npz"}


@pytest.mark.slow
def test_every_command_takes_it(cli, mine, photos):
    words = ("--models", mine, "--json")
    tested = cli("selftest", LITE, *TARGET, *words)
    assert tested.json["passed"], tested.err
    validated = cli("validate", LITE, *TARGET, "--images", photos, *words)
    assert validated.status == 0, validated.err
    predicted = cli("predict", LITE, photos, *TARGET, *words).json
    assert (predicted["target"], predicted["artifact"]) == ("aotinductor", NAME)
    assert len(predicted["predictions"]) == len(list(photos.iterdir()))
    (shown,) = (
        a for a in cli("models", "show", LITE, *words).json["artifacts"] if a["name"] == NAME
    )
    assert shown["state"] == "ok"


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_bench_takes_it_as_a_contender(cli, packaged):
    words = ("--targets", "onnxruntime,aotinductor", "--budget", "0.1", "--threads", "1")
    ran = cli("bench", LITE, *words, "--models", packaged, "--json")
    assert ran.status == 0, ran.err
    (found,) = (r for r in ran.json["results"] if r["name"] == "aotinductor")
    assert (found["form"], found["device"]) == ("network", "cpu")
    assert found["p50_ms"] > 0


@pytest.mark.slow
def test_inspect_shows_what_it_was_compiled_for(cli, packaged):
    words = ("inspect", f"{LITE}/{NAME}", "--models", packaged)
    shown, told = cli(*words), cli(*words, "--json").json
    assert f"cpu, by PyTorch {torch.__version__}" in shown.out
    assert "opset" not in shown.out
    assert told["inputs"] == {"pixels": ["batch", 3, 64, 64]}
    assert told["outputs"] == {"logits": ["batch", 10]}
    assert (told["census"], told["engine"]) == (None, None)
    assert told["package"]["instructions"] == list(aotinductor.host("cpu").instructions)


@pytest.mark.slow
def test_it_is_not_chosen_where_it_is_not_named(cli, mine, photos):
    assert default_target(Model(mine / LITE)) == "onnxruntime"
    path = mine / LITE / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["artifacts"] = [a for a in manifest["artifacts"] if a["target"] == "aotinductor"]
    path.write_text(json.dumps(manifest))
    assert default_target(Model(mine / LITE)) == "eager"
    ran = cli("predict", LITE, photos, "--models", mine)
    assert ran.status == 0
    assert "aotinductor alone was exported, which runs where --target names it" in ran.err


# where it is not for this machine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"torch": "2.1.0"}, f"compiled by PyTorch 2.1.0, and {torch.__version__} is installed"),
        ({"instructions": ["avx9000"], "cpu": "Xeon"}, "compiled on Xeon with avx9000, which this"),
        ({"machine": "riscv64"}, "compiled for linux riscv64, and this is"),
        ({"device": "cuda"}, "compiled for cuda, and --device is cpu"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "selftest", "bench", "validate"])
def test_a_package_for_another_machine_is_refused(cli, mine, photos, command, changes, told):
    edit(mine, **changes)
    words = {
        "predict": (photos, *TARGET),
        "selftest": TARGET,
        "bench": ("--targets", "aotinductor", "--budget", "0.1"),
        "validate": ("--images", photos, *TARGET),
    }[command]
    before = (mine / LITE / "1" / f"{NAME}.pt2").read_bytes()
    ran = cli(command, LITE, *words, "--models", mine)
    assert ran.status in (1, 3)
    said = ran.out + ran.err
    assert told in said
    assert f"Compile it here: coat-deploy export {LITE} --target aotinductor" in said
    assert "--device cuda" not in said
    assert (mine / LITE / "1" / f"{NAME}.pt2").read_bytes() == before


@pytest.mark.slow
def test_a_manifest_that_does_not_say_what_it_is_for_is_refused(mine):
    path = mine / LITE / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["artifacts"]:
        entry.pop("package", None)
    path.write_text(json.dumps(manifest))
    model = Model(mine / LITE)
    (artifact,) = (a for a in model.artifacts if a.name == NAME)
    with pytest.raises(CorruptArtifact, match="does not say what this package is for"):
        open_source(Source(model, "aotinductor", artifact), LoadOptions())


@pytest.mark.slow
def test_a_package_of_a_gpu_is_rebuilt_with_its_device(mine):
    edit(mine, device="cuda")
    model = Model(mine / LITE)
    (artifact,) = (a for a in model.artifacts if a.name == NAME)
    assert model.export_command(artifact).split(" --models")[0].endswith("--device cuda")
    with pytest.raises(StaleArtifact) as caught:
        open_source(Source(model, "aotinductor", artifact), LoadOptions())
    assert "--device cuda" not in str(caught.value)  # what was asked for is the CPU


@pytest.mark.slow
def test_a_truncated_package_is_refused_before_it_is_loaded(cli, mine, photos):
    path = mine / LITE / "1" / f"{NAME}.pt2"
    path.write_bytes(path.read_bytes()[:-100])
    for words in (("predict", LITE, photos), ("validate", LITE, "--images", photos)):
        ran = cli(*words, *TARGET, "--models", mine)
        assert (ran.status, ran.out) == (1, "")
        assert "is not the one that was exported" in ran.err and ran.err.count("\n") == 1


@pytest.mark.slow
def test_blocks_of_a_package_cannot_be_compared(cli, packaged, photos):
    words = ("--images", photos, "--by-block", "--models", packaged)
    ran = cli("validate", LITE, *TARGET, *words)
    assert (ran.status, ran.out) == (2, "")
    assert f"--by-block: {NAME} has no inner tensors" in ran.err


@pytest.mark.slow
def test_the_file_itself_says_when_it_is_cut_short_or_for_others(package, tmp_path):
    short = tmp_path / "short.pt2"
    short.write_bytes(package.read_bytes()[:-100])
    with pytest.raises(CorruptArtifact, match=r"short\.pt2: not a package, or cut short"):
        load_unchecked("aotinductor", short, LoadOptions())
    stranger = tmp_path / "stranger.pt2"
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(stranger, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_metadata.json"):
                metadata = json.loads(content)
                ours = json.loads(metadata[aotinductor.DESCRIPTION])
                ours["package"]["torch"] = "2.1.0"
                metadata[aotinductor.DESCRIPTION] = json.dumps(ours)
                content = json.dumps(metadata).encode()
            new.writestr(name, content)
    with pytest.raises(RunnerError, match=r"compiled by PyTorch 2\.1\.0, and .* is installed"):
        load_unchecked("aotinductor", stranger, LoadOptions())


def test_a_file_that_is_no_package_of_ours_is_refused(tmp_path):
    text, archive = tmp_path / "text.pt2", tmp_path / "archive.pt2"
    text.write_text("no package")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/aotinductor/model/x_metadata.json", '{"AOTI_DEVICE_KEY": "cpu"}')
    for path, told in (
        (text, "not a package, or cut short"),
        (archive, "not a package that was exported here"),
        (tmp_path / "none.pt2", "cannot be read"),
    ):
        with pytest.raises(CorruptArtifact, match=told):
            aotinductor.load(path, LoadOptions())


# what cannot be asked for


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--precision", "fp16"), "aotinductor fp16: is compiled for NVIDIA GPUs alone"),
        (("--precision", "bf16"), "aotinductor bf16: is compiled for NVIDIA GPUs alone"),
        (("--precision", "int8"), "unknown precision for aotinductor 'int8'"),
        (("--size", "dynamic"), "is compiled for images of one size"),
        (("--form", "traced"), "without an ONNX graph. Leave --form"),
        (("--opset", "20"), "without an ONNX graph. Leave --form"),
        (("--keep-fp32", "norm1"), "without an ONNX graph. Leave --form"),
        (("--batch", "4"), "takes any batch, and is no engine"),
    ],
)
def test_what_cannot_be_compiled_is_refused(cli, exported, words, message):
    ran = cli("export", LITE, *TARGET, "--models", exported, *words)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err and ran.err.count("\n") == 1


def test_without_a_compiler_it_is_said_what_to_install(cli, exported, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    ran = cli("export", LITE, *TARGET, "--models", exported)
    assert (ran.status, ran.out) == (1, "")
    assert "aotinductor: its C++ compiler is not installed (expected no-such-compil" in ran.err
    assert "apt install g++" in ran.err and ran.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_compiled_for(cli, exported):
    ran = cli("export", LITE, *TARGET, "--models", exported, "--device", "cuda")
    assert ran.status == 1
    assert "aotinductor: PyTorch" in ran.err and "finds no NVIDIA GPU" in ran.err


def test_a_compiler_that_fails_is_one_line(cli, bare, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("C++ compile error\n\nCommand:\ng++ ...")

    monkeypatch.setattr("coat_deploy.network.package.compile_package", fails)
    ran = cli("export", LITE, *TARGET, "--models", bare, "--weights", "random:0")
    assert (ran.status, ran.out) == (1, "")
    assert "aotinductor: not compiled: C++ compile error" in ran.err and ran.err.count("\n") == 1
    assert not (bare / LITE / "1").exists()


def test_a_server_refuses_it_with_the_reason(cli, exported):
    ports = ("--port", "0", "--grpc-port", "0")
    for names in ((LITE,), ()):
        ran = cli("serve", *names, *TARGET, "--models", exported, *ports)
        assert (ran.status, ran.out) == (2, "")
        assert "target aotinductor: is not served: it takes PyTorch" in ran.err
    refused = cli("triton", LITE, *TARGET, "--models", exported, "--out", "repository")
    assert "Triton has no backend for it" in refused.err
    words = ("--storage", "pvc://models", "--image", "coat")
    assert "is not served" in cli("kserve", LITE, *TARGET, "--models", exported, *words).err


def test_taps_are_refused(tmp_path):
    with pytest.raises(UsageError, match="has no inner tensors"):
        aotinductor.load(tmp_path / "none.pt2", LoadOptions(taps=("norm1",)))


def test_a_gpu_takes_triton_as_well(monkeypatch):
    import importlib.util

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setattr(eager, "require_compiler", lambda user: None)
    with pytest.raises(BackendMissing, match="aotinductor: the fused kernels need Triton"):
        aotinductor.require_compiler("cuda")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bar"), [("fp32", 1e-4), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_a_gpu_runs_the_fused_kernels(cli, bare, precision, bar):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    words = (*TARGET, "--precision", precision, "--device", "cuda", "--weights", "random:0")
    ran = cli("export", LITE, *words, "--models", bare, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["package"]["device"] == "cuda"
    assert ran.json["package"]["compute_capability"]
    path = bare / LITE / "1" / f"aotinductor-{precision}.pt2"
    with zipfile.ZipFile(path) as archive:
        sources = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".cpp")]
    for kernel in ("context_kernel", "attend_kernel", "position_kernel"):
        assert any(kernel in source for source in sources)
    fused = LoadOptions(device="cuda", fused=True, precision=precision)
    load = functools.partial(LoadOptions, device="cuda", precision=precision)
    for batch in (1, 2, 3):
        with eager.load(bare / LITE, fused) as network, aotinductor.load(path, load()) as runner:
            expected, got = (r.run(draw(batch))["logits"] for r in (network, runner))
        assert np.abs(got - expected).max() < bar * np.abs(expected).max()
