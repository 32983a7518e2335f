import pytest

from coat_deploy.errors import RequestError, ServerError
from coat_deploy.serve.auth import Door, read_token

TOKEN = "a-token-that-is-long-enough"


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("COAT_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("COAT_TOKEN", f"{TOKEN}-2")
    assert read_token(None) == f"{TOKEN}-2"
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 20, b"two lines\nof a token 12"])
def test_what_is_no_token_is_refused(tmp_path, content):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ServerError, match="token"):
        read_token(path)


def test_a_token_that_is_not_there_or_empty_protects_nothing(tmp_path, monkeypatch):
    with pytest.raises(ServerError, match="cannot be read"):
        read_token(tmp_path / "none")
    monkeypatch.setenv("COAT_TOKEN", "")
    with pytest.raises(ServerError, match=r"\$COAT_TOKEN: not a token"):
        read_token(None)


def test_a_door_without_a_token_is_open():
    Door(None).check(None)


@pytest.mark.parametrize(
    "shown", [None, "", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é"]
)
def test_a_door_opens_for_the_token_alone(shown):
    door = Door(TOKEN)
    door.check(f"Bearer {TOKEN}")
    with pytest.raises(RequestError) as refused:
        door.check(shown)
    assert refused.value.kind == "unauthenticated" and TOKEN not in str(refused.value)
