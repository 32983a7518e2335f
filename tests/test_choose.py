"""On onnxruntime, which takes any name for a precision: so no test depends on the CPU."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from coat_deploy import choose as choose_module  # noqa: E402
from coat_deploy.backends.select import PRECISIONS  # noqa: E402
from coat_deploy.candidate import Candidate, synthetic_batches  # noqa: E402
from coat_deploy.choose import ChooseOptions, choose  # noqa: E402
from coat_deploy.errors import (  # noqa: E402
    BelowBar,
    GraphError,
    RepositoryError,
    RunnerError,
    UsageError,
)
from coat_deploy.export import ExportOptions, export  # noqa: E402
from coat_deploy.graph.form import FORMS  # noqa: E402
from coat_deploy.machine import describe  # noqa: E402
from coat_deploy.measure.bar import get_bar  # noqa: E402
from coat_deploy.measure.bench import BenchReport  # noqa: E402
from coat_deploy.measure.latency import ColdWarm, Failure, Latency  # noqa: E402
from coat_deploy.model import ArtifactQuery, Model  # noqa: E402
from coat_deploy.open import find_source, open_source  # noqa: E402
from coat_deploy.repository import Repository  # noqa: E402
from coat_deploy.runner import LoadOptions  # noqa: E402
from coat_deploy.spec import ModelSpec, Preprocess  # noqa: E402

SPEC = ModelSpec("coat_lite_toy", 10, 40, Preprocess((64, 64)))


@pytest.fixture(autouse=True)
def two_precisions(monkeypatch):
    """fp32, and one that computes the same and has a name and a bar of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(PRECISIONS, "onnxruntime", ("fp32", "bf16"))
    monkeypatch.setitem(FORMS["onnxruntime"], "bf16", FORMS["onnxruntime"]["fp32"])
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given" / "mine").mkdir(parents=True)
    (tmp_path / "given" / "mine" / "config.json").write_text(json.dumps(SPEC.to_json()))
    return tmp_path / "given"


class Stopwatch:
    """Stands for the bench: ratios by precision are given, and who fails."""

    def __init__(self, ratios: dict[str, float], failing: tuple[str, ...] = ()) -> None:
        self.ratios, self.failing, self.calls = ratios, failing, []

    def __call__(self, contenders, pixels, options, progress) -> BenchReport:
        self.calls.append(([c.name for c in contenders], options.baseline))
        progress("bf16 (batch 1, 64x64): load and warm-up", 0.5)
        for contender in contenders:
            x = pixels(contender.batch, contender.size)
            with contender.load() as runner:
                assert len(runner.run(x)) in (1, 4)
        group = {"form": "authored", "batch": contenders[0].batch, "size": contenders[0].size}
        names = {c.name: {"name": c.name, "target": c.target, "precision": c.precision}
                 for c in contenders}  # fmt: skip
        failures = tuple(
            Failure(**names[name], **group, threads=1, error="killed by SIGKILL.")
            for name in names if name in self.failing
        )  # fmt: skip
        if len(failures) == len(names):
            raise RunnerError("bench: every contender failed.")
        results = tuple(
            self.latency(self.ratios[name], names[name] | group)
            for name in names if name not in self.failing
        )  # fmt: skip
        return BenchReport(results, failures, options, describe())

    def latency(self, ratio, names) -> Latency:
        return Latency(
            **names, threads=1, sha256=None, p50_ms=10 / ratio, p90_ms=9.0, p99_ms=9.0,
            median_interval_ms=(9 / ratio, 11 / ratio), images_per_second=1.0, ratio=ratio,
            ratio_interval=(ratio - 0.01, ratio + 0.01), baseline="fp32", load_ms=ColdWarm(1, 1),
            first_run_ms=ColdWarm(1, 1), file_evicted=None, peak_memory_mib=None,
            peak_memory_source=None, memory_before_load_mib=None, iterations=1, rounds=10,
            stopped="stable",
        )  # fmt: skip


@pytest.fixture
def timed(monkeypatch):
    """Return `put(ratios, failing)`, which puts a stopwatch in place of the bench."""

    def put(ratio: float, failing: tuple[str, ...] = (), **others: float) -> Stopwatch:
        stopwatch = Stopwatch({"fp32": 1.0, "bf16": ratio, **others}, failing)
        monkeypatch.setattr(choose_module, "bench", stopwatch)
        return stopwatch

    return put


def run(models: Path, choosing: ChooseOptions | None = None, batches=None, tell=None, **fields):
    options = ExportOptions(threads=1, **{"weights": "random:0", **fields})
    return choose(Repository.open(models), "mine", options, choosing, batches, tell)


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def considered(exported) -> dict[str, dict]:
    return {one["precision"]: one for one in exported.artifact.choice["considered"]}


def fails_for(monkeypatch, error, *failing) -> None:
    """Let loading a candidate fail, for the precisions `failing`."""
    load = Candidate.load

    def fail(self, *args):
        if self.recipe.precision in failing:
            raise error
        return load(self, *args)

    monkeypatch.setattr(Candidate, "load", fail)


# What is chosen.


@pytest.mark.parametrize(("ratio", "chosen"), [(2.0, "bf16"), (1.02, "fp32"), (0.5, "fp32")])
def test_the_winner_alone_is_put_into_the_folder(models, timed, ratio, chosen):
    timed(ratio)
    exported = run(models)
    assert exported.artifact.precision == chosen
    assert set(tree(models / "mine")) == {
        "config.json", "manifest.json", "model.safetensors",
        f"1/onnxruntime-{chosen}.onnx", f"1/onnxruntime-{chosen}.proof.npz",
    }  # fmt: skip
    assert exported.artifact.choice["precision"] == chosen


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_it_is_the_artifact_that_its_name_would_have_given(models, timed, chosen):
    timed(2.0 if chosen == "bf16" else 1.0)
    found = run(models).artifact
    options = ExportOptions(threads=1, precision=chosen, rename="other", weights="random:0")
    named = export(Repository.open(models), "mine", options).artifact
    bound = [name for name in found.files if name.endswith(".onnx")]
    assert [found.files[name] for name in bound] == [named.files[name] for name in bound]
    assert found.agreement == named.agreement and not named.choice


def test_what_was_chosen_opens_with_every_check(models, timed):
    timed(2.0)
    run(models)
    source = find_source(Model(models / "mine"), ArtifactQuery("onnxruntime"))
    open_source(source, LoadOptions(threads=1)).close()


def test_why_is_kept_in_the_manifest_and_printed(models, timed):
    timed(2.0)
    exported = run(models)
    (entry,) = json.loads((models / "mine" / "manifest.json").read_text())["artifacts"]
    assert entry["choice"] == exported.to_json()["choice"] == dict(exported.artifact.choice)
    assert Model(models / "mine").artifacts[0].choice == entry["choice"]
    assert "2.00x as fast as fp32" in entry["choice"]["why"]
    assert [one["p50_ms"] for one in entry["choice"]["considered"]] == [10.0, 5.0]


def test_an_artifact_that_was_there_stays(models, timed):
    timed(2.0)
    export(Repository.open(models), "mine", ExportOptions(weights="random:0", threads=1))
    before = tree(models / "mine")
    model = run(models, weights=None).model
    assert [artifact.name for artifact in model.artifacts] == [
        "onnxruntime-fp32", "onnxruntime-bf16",
    ]  # fmt: skip
    after = tree(models / "mine")
    assert all(after[name] == content for name, content in before.items() if name[0] == "1")


def test_a_target_of_one_precision_has_nothing_to_measure(models, timed, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "onnxruntime", ("fp32",))
    stopwatch = timed(2.0)
    exported = run(models)
    assert (exported.artifact.precision, stopwatch.calls) == ("fp32", [])
    assert exported.artifact.choice["why"] == "the only one that passes"


def test_the_bench_itself_decides_on_what_is_aside(models, monkeypatch):
    """Not timed: whichever is faster here, both were measured in processes of their own."""
    quick = {"warmup_iterations": 1, "warmup_s": 0, "min_rounds": 6, "slice_ms": 1}
    options = choose_module.BenchOptions
    monkeypatch.setattr(choose_module, "BenchOptions", lambda **how: options(**how, **quick))
    found = considered(run(models, ChooseOptions(budget_s=0)))
    assert all(one["p50_ms"] > 0 for one in found.values())
    assert [one["verdict"] for one in found.values()].count("chosen") == 1


# What is ruled out.


def test_a_precision_below_its_bar_is_ruled_out_and_not_timed(models, timed, monkeypatch):
    stopwatch = timed(9.0)
    bars = {"fp32": get_bar("fp32"), "bf16": get_bar("bf16").override(max_abs_difference=1e-12)}
    monkeypatch.setattr(choose_module, "get_bar", bars.get)
    exported = run(models)
    found = considered(exported)["bf16"]
    assert (exported.artifact.precision, found["verdict"]) == ("fp32", "ruled out")
    assert "max |delta|" in found["reason"] and "above 1e-12" in found["reason"]
    assert stopwatch.calls == []
    assert not [name for name in tree(models) if "bf16" in name]


@pytest.mark.parametrize("error", [RunnerError, GraphError])
def test_a_precision_this_machine_does_not_compute_in_is_ruled_out(
    models, timed, monkeypatch, error
):
    timed(9.0)
    fails_for(monkeypatch, error("this CPU does not compute in bf16."), "bf16")
    found = considered(run(models))["bf16"]
    assert (found["verdict"], found["reason"]) == (
        "ruled out", "this CPU does not compute in bf16.",
    )  # fmt: skip


def test_a_precision_that_cannot_be_made_so_is_ruled_out(models, timed, monkeypatch):
    settle = choose_module.settle_recipe

    def pick(spec, options):
        if options.precision == "bf16":
            raise UsageError("bf16: authored graphs only.")
        return settle(spec, options)

    monkeypatch.setattr(choose_module, "settle_recipe", pick)
    timed(9.0)
    exported = run(models)
    assert exported.artifact.precision == "fp32"
    assert considered(exported)["bf16"]["reason"] == "bf16: authored graphs only."


def test_a_precision_that_cannot_be_timed_is_ruled_out(models, timed):
    timed(9.0, failing=("bf16",))
    found = considered(run(models))
    assert found["bf16"]["reason"] == "cannot be timed: killed by SIGKILL."
    assert (found["fp32"]["verdict"], found["fp32"]["p50_ms"]) == ("chosen", 10.0)


def test_without_the_most_exact_the_others_are_timed_against_the_next(models, timed, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "onnxruntime", ("fp32", "bf16", "tf32"))
    monkeypatch.setitem(FORMS["onnxruntime"], "tf32", FORMS["onnxruntime"]["fp32"])
    stopwatch = timed(1.0, failing=("fp32",), tf32=2.0)
    exported = run(models)
    assert stopwatch.calls == [(["fp32", "bf16", "tf32"], "fp32"), (["bf16", "tf32"], "bf16")]
    assert exported.artifact.precision == "tf32"
    assert "2.00x as fast as bf16" in exported.artifact.choice["why"]


# When nothing can be chosen.


def leaves_nothing(models, error, match, **fields):
    before = tree(models)
    with pytest.raises(error, match=match):
        run(models, **fields)
    assert tree(models) == before


def test_when_none_passes_each_says_why(models, monkeypatch):
    fails_for(monkeypatch, RunnerError("it does not load."), "bf16")
    limits = ChooseOptions(limits={"max_abs_difference": 1e-12})
    match = r"no precision can be exported\. fp32: .*above 1e-12.* bf16: it does not load\."
    leaves_nothing(models, BelowBar, match, choosing=limits)


def test_when_none_can_be_timed_it_says_so(models, timed):
    timed(2.0, failing=("fp32", "bf16"))
    leaves_nothing(models, RunnerError, "every contender failed")


def test_what_would_meet_every_precision_is_told_as_it_is(models, monkeypatch):
    fails_for(monkeypatch, RepositoryError("no space left"), "fp32", "bf16")
    leaves_nothing(models, RepositoryError, "^no space left$")


def test_ctrl_c_while_measuring_leaves_what_was_there(models, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(choose_module, "bench", interrupted)
    leaves_nothing(models, KeyboardInterrupt, None)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target": "onnxruntim"}, UsageError, "Did you mean 'onnxruntime'"),
        ({"target": "eager"}, UsageError, "unknown target to export to 'eager'"),
        ({"form": "trace"}, UsageError, "^unknown form 'trace'"),
        ({"opset": 17}, GraphError, "^opset 17: not supported"),
        ({"size": (64, 31)}, GraphError, "^size 64x31: too small"),
        ({"validate": False}, UsageError, "cannot be chosen without validation"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(models, monkeypatch, fields, error, message):
    monkeypatch.setattr(choose_module, "prepare", None)  # would be the first work
    leaves_nothing(models, error, message, **fields)


# In all else it is an export.


@pytest.mark.parametrize(
    ("fields", "name", "size"),
    [
        ({"dynamic": True}, "onnxruntime-bf16-dynamic", [64, 64]),
        ({"features": True}, "onnxruntime-bf16-features", [64, 64]),
        ({"size": (64, 96)}, "onnxruntime-bf16-64x96", [64, 96]),
    ],
)
def test_other_options_hold_and_the_nominal_size_is_timed(models, timed, fields, name, size):
    timed(2.0)
    artifact = run(models, **fields).artifact
    assert (artifact.name, artifact.choice["size"]) == (name, size)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_a_traced_graph_is_chosen_among_traced_ones(models, timed):
    timed(2.0)
    assert run(models, form="traced").artifact.name == "onnxruntime-bf16-traced"


def test_limits_replace_those_of_every_bar(models, timed):
    timed(2.0)
    validation = run(models, ChooseOptions(limits={"max_abs_difference": 0.5})).validation
    assert validation is not None
    assert validation.bar == get_bar("bf16").override(max_abs_difference=0.5)


def test_images_given_are_what_every_precision_is_held_against(models, timed):
    timed(2.0)
    seen = []

    def batches(how):
        seen.append(how.input_size)
        return list(synthetic_batches(how))[:1]

    exported = run(models, batches=batches)
    assert (exported.artifact.agreement["source"], len(seen)) == ("images", 2)


def test_every_step_is_told_with_its_precision(models, timed):
    timed(2.0)
    steps: list[str] = []
    run(models, tell=steps.append)
    work = ["writing the graph", "proving it against eager", "validating"]
    each = [f"{precision}: {step}" for precision in ("fp32", "bf16") for step in work]
    measuring = "measuring bf16 (batch 1, 64x64): load and warm-up 50%"
    assert steps == ["reading weights", *each, measuring]
