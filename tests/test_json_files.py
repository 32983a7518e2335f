import json
import os

import pytest

from coat_deploy.errors import RepositoryError
from coat_deploy.json_files import MAX_JSON_BYTES, json_bytes, read_json

DOCUMENT = {
    "size": [3, 224, 224],
    "mean": [0.485, -1e-05, 1e30],
    "labels": ["a\n[\n 1", "[1,\\n 2]", "[\n3]"],
    "nested": [[1, 2], [3]],
    "empty": [],
    "maybe": None,
}


def test_a_document_survives_its_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(json_bytes(DOCUMENT))
    assert read_json(path, RepositoryError) == DOCUMENT


def test_a_list_of_numbers_stands_in_one_line():
    assert '  "size": [3, 224, 224],\n' in json_bytes(DOCUMENT).decode()


def test_not_a_number_is_never_written():
    with pytest.raises(ValueError, match="Out of range"):
        json_bytes({"x": float("nan")})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": }', b"\xff\xfe", b"[" * 100_000, b"1" * 5000],
    ids=["empty", "cut", "half", "no text", "deep", "endless number"],
)
def test_what_is_no_json_names_the_file(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(RepositoryError, match="x.json: is not JSON"):
        read_json(path, RepositoryError)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RepositoryError, match=r"x.json: cannot be read \(No such file"):
        read_json(tmp_path / "x.json", RepositoryError)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: it takes no space
    with pytest.raises(RepositoryError, match=f"too large .*{MAX_JSON_BYTES}"):
        read_json(path, RepositoryError)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(RepositoryError, match=r"x.json: not a file"):
        read_json(tmp_path / "x.json", RepositoryError)


def test_json_itself_reads_what_is_written():
    assert json.loads(json_bytes(DOCUMENT)) == DOCUMENT
