import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coat_deploy import diagnosis
from coat_deploy.backends.select import TARGETS
from coat_deploy.diagnosis import TargetState
from coat_deploy.finding import Finding
from coat_deploy.machine import Gpu, Machine
from coat_deploy.repository import Repository

MACHINE = Machine(
    cpu="A processor",
    cores=2,
    threads=4,
    cpu_quota=None,
    cpu_features=("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
    memory_mib=8192,
    system="Linux 6.1",
    python="3.11.7",
    versions={},
)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules other processes import."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder and cache, and no variables that choose others."""
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.setenv("COAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def subjects(findings: object) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}  # type: ignore[attr-defined]


def folders(models: Path | None = None) -> dict[str, Finding]:
    return subjects(diagnosis.examine_folders(Repository.open(models)))


def test_every_target_has_modules_to_import() -> None:
    assert set(diagnosis.MODULES) == set(TARGETS)


def test_what_imports_tells_its_version(modules: Path) -> None:
    (modules / "whole.py").write_text("__version__ = '1.2+cu1'; print('noise')")
    assert diagnosis.import_apart(("whole",)) == ({"whole": "1.2+cu1"}, None)


def test_an_import_that_fails_is_told_by_the_last_line(modules: Path) -> None:
    (modules / "whole.py").write_text("__version__ = '1.2'")
    (modules / "broken.py").write_text("raise ImportError('libx.so.1: cannot open')")
    found = diagnosis.import_apart(("whole", "broken"))
    assert found == ({"whole": "1.2"}, "ImportError: libx.so.1: cannot open")


def test_an_import_that_ends_its_process_is_survived(modules: Path) -> None:
    (modules / "crash.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    _, error = diagnosis.import_apart(("crash",))
    assert error is not None and error.startswith("the process was ended by: Killed")


def test_an_import_that_hangs_is_given_up(modules: Path) -> None:
    (modules / "whole.py").write_text("__version__ = '1.2'")
    (modules / "hangs.py").write_text("import time; time.sleep(60)")
    found = diagnosis.import_apart(("whole", "hangs"), timeout_s=3.0)
    assert found == ({"whole": "1.2"}, "not done after 3 s")


def test_the_remains_of_a_removed_package_do_not_count_as_installed(modules: Path) -> None:
    (modules / "remains" / "capi").mkdir(parents=True)
    _, error = diagnosis.import_apart(("remains",))
    assert error is not None and "__version__" in error


def test_a_file_in_the_working_folder_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lurking_module.py").write_text("__version__ = '0'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    _, error = diagnosis.import_apart(("lurking_module",))
    assert error == "ModuleNotFoundError: No module named 'lurking_module'"


def test_a_target_that_is_not_installed_tells_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    state = diagnosis.examine_target("onnxruntime", {})
    assert not state.installed and not state.usable
    assert state.command == 'pip install "coat-deploy[cpu]"'


def test_a_broken_target_is_mended_by_installing_its_package_anew(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (modules / "onnxruntime.py").write_text("raise ImportError('bad')")
    monkeypatch.setattr(diagnosis, "_installed", {"onnxruntime-gpu": "1.22"}.get)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    state = diagnosis.examine_target("onnxruntime", {})
    assert state.installed and not state.usable
    assert state.error == "onnxruntime does not import: ImportError: bad"
    assert state.command == "pip install --force-reinstall onnxruntime-gpu"


def test_a_target_broken_by_a_clash_is_mended_by_ending_the_clash(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (modules / "onnxruntime.py").write_text("raise ImportError('bad')")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    installed = {"onnxruntime": "1.22", "onnxruntime-gpu": "1.22"}
    clashes = dict(diagnosis.find_clashes(installed))
    state = diagnosis.examine_target("onnxruntime", clashes)
    assert state.command == clashes["onnxruntime"].command


@pytest.mark.parametrize(("has_gpu", "extra"), [(False, "cpu"), (True, "gpu")])
def test_two_onnxruntimes_clash(has_gpu: bool, extra: str) -> None:
    installed = {"onnxruntime": "1.22", "onnxruntime-gpu": "1.21"}
    [(module, finding)] = diagnosis.find_clashes(installed, has_gpu)
    assert (module, finding.level) == ("onnxruntime", "problem")
    assert finding.what.startswith("onnxruntime 1.22 and onnxruntime-gpu 1.21 overwrite")
    assert finding.command == (
        f'pip uninstall --yes onnxruntime onnxruntime-gpu && pip install "coat-deploy[{extra}]"'
    )


def test_one_onnxruntime_is_no_clash() -> None:
    assert not list(diagnosis.find_clashes({"onnxruntime-gpu": "1.21", "openvino": "2026.4"}))


def test_packages_too_old_for_us_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_installed", {"numpy": "1.26.4", "torch": "2.10.0+cpu"}.get)
    lines = ["numpy>=1.26", 'torch>=2.11; extra == "torch"', 'ruff>=9; extra == "dev"']
    found = subjects(diagnosis.examine_packages(lines))
    assert set(found) == {"torch", "packages"}
    assert found["torch"].level == "problem"
    assert found["torch"].command == "pip install --upgrade 'torch>=2.11'"
    assert found["packages"].what == "numpy 1.26.4, torch 2.10.0+cpu"


def test_a_pre_release_is_as_new_as_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_installed", {"torch": "2.11.0a0+git1"}.get)
    found = diagnosis.examine_packages(['torch>=2.11; extra == "torch"'])
    assert [finding.level for finding in found] == ["ok"]


def test_what_exporting_lacks_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_installed", {"torch": "2.11"}.get)
    lines = ['torch>=2.7; extra == "torch"', "onnx>=1.19; extra == 'torch'"]
    found = subjects(diagnosis.examine_packages(lines))["extra torch"]
    assert (found.level, found.command) == ("note", 'pip install "coat-deploy[torch]"')
    assert found.what == "onnx not installed, needed for exporting and validating"


@pytest.mark.parametrize(
    ("features", "level", "told"),
    [
        (("avx2", "avx512f", "avx512_bf16", "amx_bf16"), "ok", "matrix units and is much faster"),
        (("avx2", "avx512f", "avx512_bf16"), "ok", "computes bf16, without matrix units"),
        (("avx2", "fma"), "ok", "OpenVINO takes fp32 artifacts only"),
        (("neon", "bf16"), "ok", "four numbers at a time"),
        (("f16c",), "note", "every target is slow here"),
        ((), "note", "unknown"),
    ],
)
def test_processor_features_are_told_by_what_they_give(
    features: tuple[str, ...], level: str, told: str
) -> None:
    machine = replace(MACHINE, cpu_features=features)
    found = subjects(diagnosis.examine_machine(machine))["cpu features"]
    assert found.level == level
    assert told in found.what


def test_a_limit_on_processors_is_told() -> None:
    found = subjects(diagnosis.examine_machine(replace(MACHINE, cpu_quota=1.5)))["processor"]
    assert found.what == "A processor: 2 cores, 4 threads, limited to 1.5 CPUs"


def test_gpus_are_told_with_their_driver() -> None:
    machine = replace(MACHINE, gpus=(Gpu("NVIDIA H200", "570", 143360),))
    found = subjects(diagnosis.examine_machine(machine))["gpu"]
    assert found.what.startswith("NVIDIA H200, 140 GiB, driver 570")


def test_an_nvidia_smi_without_a_gpu_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    found = subjects(diagnosis.examine_machine(MACHINE))["gpu"]
    assert (found.level, found.command) == ("note", "nvidia-smi")


def test_a_missing_target_is_a_note_and_a_broken_one_a_problem() -> None:
    states = [
        TargetState("eager", False, False, error="not installed", command="pip install a"),
        TargetState("onnxruntime", True, False, error="does not import", command="pip install b"),
        TargetState("openvino", True, True, {"openvino": "2026.4.1-22982-e21"}),
    ]
    found = subjects(diagnosis.examine_targets(states, MACHINE))
    assert found["target eager"] == Finding(
        "note", "target eager", "not installed", "pip install a"
    )
    assert found["target onnxruntime"].level == "problem"
    assert found["target openvino"].what == "usable, openvino 2026.4.1"
    assert "targets" not in found


@pytest.mark.parametrize(
    ("installed", "command"), [(False, 'pip install "coat-deploy[cpu]"'), (True, "pip install a")]
)
def test_no_usable_target_at_all_is_a_problem(installed: bool, command: str) -> None:
    states = [TargetState("eager", installed, False, error="why", command="pip install a")]
    found = subjects(diagnosis.examine_targets(states, MACHINE))["targets"]
    assert (found.level, found.command) == ("problem", command)


@pytest.mark.parametrize(("gpus", "told"), [((), True), ((Gpu("x", "1", None),), False)])
def test_torch_for_cuda_is_only_noted_without_a_gpu(gpus: tuple[Gpu, ...], told: bool) -> None:
    states = [TargetState("eager", True, True, {"torch": "2.13.0+cu130"})]
    found = list(diagnosis.examine_targets(states, replace(MACHINE, gpus=gpus)))
    assert [f.level for f in found] == ["ok", "note"] if told else ["ok"]


@pytest.mark.usefixtures("nothing_set")
def test_folders_that_are_not_there_yet_are_fine_and_are_not_made(tmp_path: Path) -> None:
    found = folders()
    assert all(finding.level == "ok" for finding in found.values())
    assert found["models written to"].what.startswith(
        f"{tmp_path / 'models'}: writable, made when first needed"
    )
    assert found["COAT_MODELS"].what == "not set"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_set")
def test_coat_models_is_where_models_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COAT_MODELS", str(tmp_path))
    found = folders()
    assert found["COAT_MODELS"].what == str(tmp_path)
    assert found["models written to"].what.startswith(f"{tmp_path}: writable, ")
    assert found["models read from"].what.startswith(f"{tmp_path}, then ")


@pytest.mark.usefixtures("nothing_set")
def test_a_tilde_that_no_shell_expanded_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COAT_MODELS", "~/models")
    monkeypatch.setenv("HOME", "/home/someone")
    found = folders()["COAT_MODELS"]
    assert (found.level, found.command) == ("problem", "export COAT_MODELS=/home/someone/models")


@pytest.mark.usefixtures("nothing_set")
def test_a_file_in_place_of_the_models_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = folders(tmp_path / "file")["models written to"]
    assert found.level == "problem"
    assert found.command == 'export COAT_MODELS="$HOME/coat-models"'


@pytest.mark.usefixtures("nothing_set")
def test_a_folder_that_is_only_read_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = folders()
    assert {found[key].level for key in ("models written to", "cache")} == {"note"}
    assert found["cache"].command == 'export COAT_CACHE="$HOME/coat-cache"'


@pytest.mark.usefixtures("nothing_set")
def test_little_space_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "LITTLE_SPACE_BYTES", 1 << 62)
    found = folders()["models written to"]
    assert found.level == "note" and "little for a model" in found.what


@pytest.mark.usefixtures("nothing_set")
def test_a_model_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{")
    found = folders()
    assert found["model mine"].level == "problem"
    assert "is not JSON" in found["model mine"].what
    assert found["models"].what.startswith("9 found, 0 with weights")


def test_nothing_heavy_is_imported_by_the_one_who_asks(tmp_path: Path) -> None:
    script = (
        "import sys; from coat_deploy import diagnosis;"
        "diagnosis.import_apart = lambda modules: ({}, None); diagnosis.diagnose();"
        "print({'torch', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_the_diagnosis_of_this_installation_names_every_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosis, "import_apart", lambda names: (dict.fromkeys(names, "1"), None))
    document = diagnosis.diagnose().to_json()
    assert tuple(document["targets"]) == TARGETS
    assert document["machine"]["python"] == sys.version.split()[0]
    told = {finding["subject"] for finding in document["findings"]}
    assert {"python", "coat-deploy", "packages", "processor", "memory", "cache"} <= told


def test_only_problems_are_unhealthy() -> None:
    def healthy(level: str) -> bool:
        found = Finding(level, "s", "w")  # type: ignore[arg-type]
        return diagnosis.Diagnosis((found,), MACHINE, ()).healthy

    assert [healthy(level) for level in ("ok", "note", "problem")] == [True, True, False]
