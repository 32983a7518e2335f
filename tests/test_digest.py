import hashlib

import pytest

from coat_deploy.digest import sha256_bytes, sha256_file
from coat_deploy.errors import RepositoryError

CONTENT = bytes(range(256)) * 5000


def test_a_files_digest_is_its_contents(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    assert sha256_file(tmp_path / "x") == sha256_bytes(CONTENT)


def test_a_digest_is_sha256_in_hexadecimal_digits():
    assert sha256_bytes(b"coat") == hashlib.sha256(b"coat").hexdigest()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RepositoryError, match=r"x: cannot be read \(No such file"):
        sha256_file(tmp_path / "x")
