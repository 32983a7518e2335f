import json
import re

import pytest

pytestmark = pytest.mark.usefixtures("brief")

QUICK = ("--throughput", "--budget", "0.1", "--batch", "1,2")


@pytest.mark.slow
def test_every_target_gets_its_best_streams_and_batch(cli, models, tmp_path, monkeypatch):
    # Threads of a toy wait more than they compute, and waiting awake takes the cores of others.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    record = tmp_path / "results.jsonl"
    words = ("--targets", "eager,onnxruntime,openvino", "--threads", "2", "--json")
    ran = cli("bench", "coat_lite_toy", "--models", models, *words, "--record", record, *QUICK)
    assert (ran.status, ran.err) == (0, "")
    results = ran.json["results"]
    assert [r["name"] for r in results] == ["eager", "onnxruntime", "openvino"]
    for result in results:
        assert result["threads"] == result["streams"] * result["threads_per_stream"] == 2
        tried = {(t["streams"], t["batch"]) for t in result["tried"]}
        assert tried == {(1, 1), (1, 2), (2, 1), (2, 2)}
        assert (result["streams"], result["batch"]) in tried
        low, high = result["images_per_second_interval"]
        assert 0 < low <= result["images_per_second"] <= high
        assert 0 < result["p50_ms"] <= result["p99_ms"]
        assert result["baseline"] == "eager"
        assert (result["agreement"] is None) == (result["target"] == "eager")
    assert results[0]["ratio"] == 1
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["kind"], line["name"], line["model"]) for line in lines] == [
        ("throughput", result["name"], "coat_lite_toy") for result in results
    ]


def test_the_tables_show_the_best_and_what_was_tried(cli, models):
    words = ("--targets", "onnxruntime", "--threads", "1")
    ran = cli("bench", "coat_lite_toy", "--models", models, *words, *QUICK)
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    # Which of the two ends a short run depends on how even the machine is.
    what, ended = lines[0].split(": ", 1)
    assert what == "coat_lite_toy, throughput, 64x64, 1 thread"
    assert re.match(r"ended by --budget|stable after \d+ rounds", ended)
    assert max(map(len, lines)) <= 80
    tried = lines.index("Tried: images/s of each batch, in one short run")
    assert lines[tried + 1].split() == ["streams", "1", "2"]
    name, streams, *rates = lines[tried + 2].split()
    assert (name, streams) == ("onnxruntime", "1") and all(float(rate) > 0 for rate in rates)


def test_a_target_that_fails_does_not_stop_the_others(cli, models, damage):
    damage(models / "coat_lite_toy", "head", "openvino")
    words = ("--targets", "openvino,onnxruntime", "--threads", "1", "--json")
    ran = cli("bench", "coat_lite_toy", "--models", models, *words, *QUICK)
    assert ran.status == 1
    assert [result["name"] for result in ran.json["results"]] == ["onnxruntime"]
    assert {failure["name"] for failure in ran.json["failures"]} == {"openvino"}
    assert "not the one that was exported" in ran.json["failures"][0]["error"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--threads", "1,2"), "--threads: one number with --throughput (got 1,2)"),
        (("--plot", "rates.svg"), "--plot: draws latencies, not throughput"),
        (("--batch", "0"), "--batch: must be 1 to 65536 (got 0)"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_measured(words, said, cli, models):
    ran = cli("bench", "coat_lite_toy", "--models", models, "--throughput", *words)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err and ran.err.count("\n") == 1
