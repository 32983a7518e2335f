import json

import pytest

from coat_deploy.backends import eager, openvino, select
from coat_deploy.cli import peers
from coat_deploy.cli.contenders import Entry
from coat_deploy.errors import PrecisionMissing
from coat_deploy.measure import limits

pytestmark = pytest.mark.usefixtures("brief", "quick_limits")

QUICK = ("--budget", "0.1", "--threads", "1")
ON_A_CPU = {
    "eager": ("fp32",), "onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16"),
}  # fmt: skip


@pytest.fixture
def three(monkeypatch, traced_once):
    """Three peers that start quickly, of those there are."""
    names = ("onnxruntime:traced", "onnxruntime", "openvino")
    monkeypatch.setattr(peers, "peer_entries", lambda: [Entry.parse(name) for name in names])


@pytest.fixture
def two(monkeypatch):
    """Two peers that are there already."""
    names = ("onnxruntime", "openvino")
    monkeypatch.setattr(peers, "peer_entries", lambda: [Entry.parse(name) for name in names])


def test_peers_are_pytorch_and_every_precision_traced_and_authored(monkeypatch):
    monkeypatch.setattr(select, "TARGETS", tuple(ON_A_CPU))
    monkeypatch.setattr(select, "PRECISIONS", ON_A_CPU)
    assert [entry.text for entry in peers.peer_entries()] == [
        *("eager", "eager:compile"),
        *("onnxruntime:traced", "openvino:traced", "openvino:bf16:traced"),
        *("onnxruntime", "onnxruntime:int8", "openvino", "openvino:bf16"),
    ]


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("eager", None),
        ("eager:compile", None),
        ("openvino:bf16:traced", None),
        ("onnxruntime", "onnxruntime:traced"),
        ("onnxruntime:int8", "onnxruntime:traced"),  # nobody traces int8
        ("openvino", "openvino:traced"),
        ("openvino:bf16", "openvino:bf16:traced"),
    ],
)
def test_an_authored_graph_is_held_against_the_traced_one_of_its_runtime(monkeypatch, name, peer):
    monkeypatch.setattr(select, "TARGETS", tuple(ON_A_CPU))
    monkeypatch.setattr(select, "PRECISIONS", ON_A_CPU)
    assert Entry.parse(name).peer(peers.peer_entries()) == peer


def test_engines_are_peers_too_in_every_precision():
    names = {entry.text for entry in peers.peer_entries()}
    assert {"tensorrt", "tensorrt:fp16", "tensorrt:fp16:traced", "tensorrt-rtx:bf16"} <= names


def test_without_a_traced_graph_there_is_nothing_to_be_held_against():
    entries = [Entry.parse(name) for name in ("onnxruntime", "openvino:traced")]
    assert entries[0].peer(entries) is None


@pytest.mark.slow
@pytest.mark.usefixtures("three")
def test_peers_are_compared_with_ratios_limits_and_agreement(cli, models, tmp_path):
    record = tmp_path / "results.jsonl"
    words = ("--peers", "--json", "--record", record)
    ran = cli("bench", "coat_lite_toy", "--models", models, *words, *QUICK)
    assert ran.status == 0, ran.err
    results = ran.json["results"]
    assert [(r["batch"], r["name"]) for r in results] == [
        (batch, name)
        for batch in (1, 8)
        for name in ("onnxruntime:traced", "onnxruntime", "openvino")
    ]
    assert {r["baseline"] for r in results} == {"onnxruntime:traced"}
    for r in results:
        assert r["limit_share"] == pytest.approx(r["limit_ms"] / r["p50_ms"])
        assert r["agreement"]["max_abs_difference"] < 1e-4
        assert (r["peer"] is None) == (r["name"] != "onnxruntime")
    ours = results[1]
    assert ours["peer_ratio"] == pytest.approx(results[0]["p50_ms"] / ours["p50_ms"])
    assert ours["peer_ratio_interval"][0] <= ours["peer_ratio"] <= ours["peer_ratio_interval"][1]
    found = ran.json["limits"]
    assert [(r["target"], r["precision"], r["threads"]) for r in found["rates"]] == [
        ("onnxruntime", "fp32", 1), ("openvino", "fp32", 1),
    ]  # fmt: skip
    assert found["work"]["size"] == [64, 64] and found["bandwidths"][0]["gb_per_s"] > 0
    assert (ran.json["left_out"], ran.json["failures"]) == ([], [])
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["peer_ratio"] for line in lines] == [r["peer_ratio"] for r in results]
    assert all(line["limits"] == found for line in lines)


@pytest.mark.usefixtures("two")
def test_a_peer_whose_runtime_is_missing_is_left_out_and_no_failure(cli, models, monkeypatch):
    monkeypatch.setattr(openvino, "missing", lambda: "pip install it")
    ran = cli("bench", "coat_lite_toy", "--models", models, "--peers", "--json", *QUICK)
    assert ran.status == 0, ran.err
    (left_out,) = ran.json["left_out"]
    assert left_out["name"] == "openvino" and "pip install it" in left_out["reason"]
    assert "left out: openvino: " in ran.err and ran.json["failures"] == []
    assert "openvino" not in {result["name"] for result in ran.json["results"]}


@pytest.mark.usefixtures("two")
def test_a_peer_in_a_precision_this_cpu_lacks_is_left_out(cli, models, monkeypatch):
    def refuse(path, options):
        raise PrecisionMissing("this CPU does not compute in bf16.")

    monkeypatch.setattr(openvino, "load", refuse)
    ran = cli("bench", "coat_lite_toy", "--models", models, "--peers", "--batch", "1", *QUICK)
    assert ran.status == 0, ran.err
    assert "left out: openvino: this CPU does not compute in bf16." in ran.err.splitlines()


@pytest.mark.usefixtures("two")
def test_a_peer_that_is_broken_is_a_failure(cli, models, damage):
    damage(models / "coat_lite_toy", "head", "openvino")
    ran = cli("bench", "coat_lite_toy", "--models", models, "--peers", "--batch", "1", *QUICK)
    assert ran.status == 1
    assert "could not be measured: openvino" in ran.err


def test_what_is_left_out_for_one_reason_is_one_line(capsys):
    peers.tell_left_out({"a": "not installed.", "b": "no bf16.", "c": "not installed."})
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["left out: a, c: not installed.", "left out: b: no bf16."]


def test_peers_and_targets_exclude_each_other(cli, models):
    words = ("--peers", "--targets", "onnxruntime")
    ran = cli("bench", "coat_lite_toy", "--models", models, *words, *QUICK)
    assert (ran.status, ran.out) == (2, "")
    assert "--peers: names the targets itself" in ran.err


def test_limits_come_with_any_targets(cli, models):
    words = ("--targets", "onnxruntime", "--limits", *QUICK)
    ran = cli("bench", "coat_lite_toy", "--models", models, *words)
    assert ran.status == 0, ran.err
    assert "of limit" in ran.out and "over traced" not in ran.out


def test_limits_are_not_measured_unless_asked_for(cli, models):
    words = ("--targets", "onnxruntime", "--json", *QUICK)
    ran = cli("bench", "coat_lite_toy", "--models", models, *words)
    assert ran.json["limits"] is None
    assert ran.json["results"][0]["limit_share"] is None


@pytest.mark.usefixtures("three")
def test_without_pytorch_peers_go_on_without_limits_and_exports(cli, models, monkeypatch):
    monkeypatch.setattr(eager, "missing", lambda: "pip install torch")
    ran = cli("bench", "coat_lite_toy", "--models", models, "--peers", "--json", *QUICK)
    assert ran.status == 0, ran.err
    assert {result["name"] for result in ran.json["results"]} == {"onnxruntime", "openvino"}
    assert [entry["name"] for entry in ran.json["left_out"]] == ["onnxruntime:traced"]
    assert ran.json["limits"] is None and "left out: limits: " in ran.err


def test_limits_that_were_asked_for_need_pytorch(cli, models, monkeypatch):
    monkeypatch.setattr(eager, "missing", lambda: "pip install torch")
    words = ("--targets", "onnxruntime", "--limits", *QUICK)
    ran = cli("bench", "coat_lite_toy", "--models", models, *words)
    assert (ran.status, ran.out) == (1, "")
    assert "pip install torch" in ran.err


def test_a_runtime_whose_products_fail_is_told_of_and_the_bench_goes_on(cli, models, monkeypatch):
    monkeypatch.setattr(limits.measure_rate, "__defaults__", (1e-6,))
    words = ("--targets", "onnxruntime", "--limits", "--json", *QUICK)
    ran = cli("bench", "coat_lite_toy", "--models", models, *words)
    assert ran.status == 0, ran.err
    assert "limits: onnxruntime fp32 was not measured: no answer within" in ran.err
    assert ran.json["results"][0]["limit_share"] is None
