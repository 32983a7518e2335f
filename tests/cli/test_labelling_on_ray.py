"""`predict --engine ray` on two nodes of a real cluster, killed and gone on with."""

import importlib
import importlib.util
import os
import time
import warnings

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install coat-deploy[ray]", allow_module_level=True)
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.slow
COPIES = 20


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A cluster of two nodes on this machine, of 4 CPUs each as Ray counts them."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of what it uses itself
        token = tmp_path_factory.mktemp("token") / "token"
        token.write_text("0" * 64)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster_utils = importlib.import_module("ray.cluster_utils")
        cluster = cluster_utils.Cluster()
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=4, include_dashboard=False)
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture
def tree(photos, tmp_path):
    """Photographs of the same names in many folders, and one that is broken."""
    for i in range(COPIES):
        folder = tmp_path / "tree" / str(i)
        folder.mkdir(parents=True)
        for photo in photos.iterdir():
            os.link(photo, folder / photo.name)
    (tmp_path / "tree" / "bad.jpg").write_bytes(b"")
    return tmp_path / "tree"


def rows(out):
    read = parquet.read_table(out).to_pylist()
    found = {row["path"]: row for row in read}
    assert len(found) == len(read)
    return found


def test_a_killed_run_is_gone_on_with_on_two_nodes(
    cli, script, started, address, models, tree, tmp_path
):
    out = tmp_path / "labels"
    words = ("predict", "coat_lite_toy", tree, "--models", models)
    on_ray = ("--out", out, "--engine", "ray", "--address", address, "--workers", "2")
    process = started(*words, *on_ray, "--per-file", "2")
    while len(list(out.glob("part-*"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    # At once: workers of the killed driver may still label.
    ended = script(*words, *on_ray, "--per-file", "2", "--json")
    assert ended.status == 0, ended.err
    images = 13 * COPIES + 1
    assert (ended.json["images"], ended.json["errors"]) == (images, 1)
    assert 0 < ended.json["labelled"] < images
    assert ended.json["nodes"] == 2
    listed = cli(*words, "--json").json["predictions"]
    found = rows(out)
    assert set(found) == {file.relative_to(tree).as_posix() for file in tree.rglob("*.jpg")}
    for prediction in listed:
        row = found[os.path.relpath(prediction["image"], tree)]
        assert row["labels"] == [label["label"] for label in prediction["labels"]]
    again = script(*words, *on_ray)
    assert (again.status, "nothing was left to do" in again.out) == (0, True)


def test_what_a_worker_meets_is_one_line(script, address, models, tree, tmp_path, damage):
    damage(models / "coat_lite_toy", "head")
    out = ("--out", tmp_path / "labels", "--engine", "ray", "--address", address)
    ran = script("predict", "coat_lite_toy", tree, "--models", models, *out, "--workers", "1")
    assert (ran.status, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert "not the one that was exported" in line
    assert not list((tmp_path / "labels").glob("part-*"))


def test_more_workers_than_there_is_room_for_are_told(script, address, models, tree, tmp_path):
    out = ("--out", tmp_path / "labels", "--engine", "ray", "--address", address)
    ran = script("predict", "coat_lite_toy", tree, "--models", models, *out, "--workers", "9")
    assert (ran.status, ran.out) == (2, "")
    assert "more than Ray has room for (got 9 of 1 CPUs each, expected 8 at most)" in ran.err


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ("127.0.0.1:1", 1, "cannot be reached"),
        ("ray://127.0.0.1:10001", 2, "expected HOST:PORT, or auto"),
        ("nowhere", 2, "expected HOST:PORT, or auto"),
    ],
)
def test_an_address_where_no_cluster_is_is_told(wrong, status, words, cli, models, tree, tmp_path):
    out = ("--out", tmp_path / "labels", "--engine", "ray", "--address", wrong)
    ran = cli("predict", "coat_lite_toy", tree, "--models", models, *out)
    assert (ran.status, ran.out) == (status, "")
    assert words in ran.err
