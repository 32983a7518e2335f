import base64
import hashlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from coat_deploy.errors import BackendMissing, RepositoryError, UploadError, UsageError
from coat_deploy.network import push
from coat_deploy.network.push import check_push, push_model

huggingface_hub = pytest.importorskip("huggingface_hub")

TOKEN = "hf_secret"
REPOSITORY = "ada/coat_toy"

UPLOADED = {
    "config.json": b'{"architecture": "coat_lite_nano"}\n',
    "model.safetensors": bytes(range(256)) * 4096,
    "README.md": b"---\nlicense: apache-2.0\n---\n# coat_toy\n",
    "recipe.toml": b"epochs = 3\n",
    "metrics.json": b'{"top1": 0.5}\n',
    "confusion.png": b"\x89PNG\r\n\x1a\n\x00\xff" * 9,
    "confusion.svg": b"<svg>confusion</svg>",
    "training.png": b"\x89PNG\r\n\x1a\n\x00\xfe" * 9,
    "training.svg": b"<svg>training</svg>",
}
KEPT = {
    "manifest.json": b"{}",
    ".hidden.png": b"hidden",
    "notes.txt": b"mine",
    "1/model.onnx": b"onnx",
    "training/last.pt": b"checkpoint",
    "training/config.json": b"{}",
    "training/training.png": b"another",
    ".undo/config.json": b"{}",
}


class Hub(ThreadingHTTPServer):
    """The little of the Hugging Face Hub that an upload takes, and what it got."""

    daemon_threads = True

    def __init__(self):
        self.account = account()
        self.repositories: dict[str, dict] = {}
        self.stored: dict[str, bytes] = {}
        self.commits: list[dict] = []
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuse: tuple[str, int, object] | None = None
        self.card_warnings: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository=REPOSITORY):
        return self.repositories[repository]["files"]

    def answer(self, method, path, body):
        """Return the status and the answer to a request, as the hub does."""
        match method, path.strip("/").split("/"):
            case "GET", ["api", "whoami-v2"]:
                return 200, self.account
            case "POST", ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                found = [{"message": text} for text in self.card_warnings]
                return 200, {"errors": [], "warnings": found}
            case "GET", ["api", "models", owner, name, *_]:
                if not (here := self.repositories.get(f"{owner}/{name}")):
                    return 404, {"error": "Repository not found"}
                known = {"id": f"{owner}/{name}", "sha": "0" * 40, "private": here["private"]}
                return 200, known
            case "POST", ["api", "models", owner, name, "preupload", "main"]:
                here = self.files(f"{owner}/{name}")
                asked = [file["path"] for file in json.loads(body)["files"]]
                return 200, {"files": [upload_mode(path, here.get(path)) for path in asked]}
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return 200, {"objects": [self.place(file) for file in json.loads(body)["objects"]]}
            case "PUT", ["stored", oid]:
                self.stored[oid] = body
                return 200, {}
            case "POST", ["api", "models", owner, name, "commit", "main"]:
                return self.commit(f"{owner}/{name}", [json.loads(x) for x in body.splitlines()])
        return 404, {"error": f"no {method} {path}"}

    def create(self, asked):
        repository = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.url}/{repository}"}
        if repository in self.repositories:
            return 409, answer
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repositories[repository] = {"files": {}, "private": bool(private), "asked": asked}
        return 200, answer

    def place(self, file):
        href = {"href": f"{self.url}/stored/{file['oid']}"}
        return {"oid": file["oid"], "size": file["size"], "actions": {"upload": href}}

    def commit(self, repository, lines):
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                files[value["path"]] = self.stored[value["oid"]]
        self.commits.append({"summary": lines[0]["value"]["summary"], "files": files})
        self.files(repository).update(files)
        return 200, {"commitUrl": f"{self.url}/{repository}/commit/1", "commitOid": "1" * 40}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        if not self.path.startswith("/stored/"):  # a storage of others, which gets no token
            self.server.tokens.add(self.headers["Authorization"])
        body = self.body()
        part, status, answer = self.server.refuse or ("", 0, None)
        if not status or part not in self.path:
            status, answer = self.server.answer(self.command, self.path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if answer is data else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PUT = do_GET

    def body(self):
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_):
        pass


def account(role="write", **token):
    """What the hub says of the owner of a token, a member of the organisation "lab"."""
    access = {"displayName": "test", "role": role, **token}
    auth = {"type": "access_token", "accessToken": access}
    return {"type": "user", "name": "ada", "orgs": [{"type": "org", "name": "lab"}], "auth": auth}


def upload_mode(path, here):
    """Say, as the hub does, how to send a file and what is there of that name."""
    large = path.endswith((".safetensors", ".png"))
    if here is None:
        oid = None
    elif large:
        oid = hashlib.sha256(here).hexdigest()
    else:
        oid = hashlib.sha1(b"blob %d\0" % len(here) + here).hexdigest()
    mode = "lfs" if large else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


@pytest.fixture
def hub():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join(timeout=5)


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch, tmp_path):
    """Log in nowhere but here: our token, our proxy, nothing but 127.0.0.1."""
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(tmp_path / name))
    # Xet, the hub's other way to take a large file, leads to a storage that has no stand-in here;
    # telemetry asks the public hub what programs there are.
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", True)
    asked, look_up = set(), socket.getaddrinfo

    def look_up_here(host, *rest, **named):
        asked.add(host)
        if host != "127.0.0.1":
            raise socket.gaierror(f"no {host} here")
        return look_up(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    huggingface_hub.close_session()  # it keeps the proxies of whoever asked first
    yield
    huggingface_hub.close_session()
    assert asked <= {"127.0.0.1"}


@pytest.fixture
def folder(tmp_path):
    """A trained model's folder, with all that may lie in it."""
    folder = tmp_path / "models" / "coat_toy"
    for name, data in {**UPLOADED, **KEPT}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def impatient(monkeypatch):
    """Let the client repeat what fails without its pauses, half a minute in all."""
    pauses = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", pauses.append)
    return pauses


def content(folder):
    """Every file under a folder, its bytes and the time it was last written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def refused(call, *arguments, match=None, error=UploadError):
    """Return the message of a call that must fail: one line, in seconds, without the token."""
    began = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        call(*arguments)
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def closed_port():
    with Hub() as gone:
        return gone.url


def test_a_model_goes_up_in_one_commit_and_nothing_else_of_its_folder(hub, folder, capfd):
    before = content(folder)
    assert push_model(folder, REPOSITORY, hub.url) == f"{hub.url}/{REPOSITORY}"
    assert [commit["files"] for commit in hub.commits] == [UPLOADED]
    assert set(hub.stored.values()) == {
        data for name, data in UPLOADED.items() if name.endswith((".safetensors", ".png"))
    }
    assert hub.commits[0]["summary"].startswith("Upload coat_toy with coat-deploy ")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert content(folder) == before
    assert capfd.readouterr() == ("", "")


def test_the_files_are_those_that_a_training_ends_with():
    pytest.importorskip("torch")
    from coat_deploy.train import finish

    assert {finish.CARD, finish.RECIPE, finish.METRICS} == set(push.DESCRIBING)
    assert {Path(name).suffix for name in finish.PICTURES} == set(push.PICTURE_SUFFIXES)
    assert {*push.NEEDED, *push.DESCRIBING, *finish.PICTURES} == set(UPLOADED)


def test_a_repository_that_is_there_gets_another_commit(hub, folder):
    push_model(folder, REPOSITORY, hub.url)
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\n")
    push_model(folder, REPOSITORY, hub.url)
    assert len(hub.commits) == 2
    assert hub.files() == {**UPLOADED, "README.md": b"---\nlicense: mit\n---\n"}


def test_the_same_model_again_makes_no_empty_commit(hub, folder):
    push_model(folder, REPOSITORY, hub.url)
    assert push_model(folder, REPOSITORY, hub.url) == f"{hub.url}/{REPOSITORY}"
    assert len(hub.commits) == 1


def test_a_private_model_is_private_from_the_first_moment(hub, folder):
    push_model(folder, REPOSITORY, hub.url, private=True)
    assert hub.repositories[REPOSITORY]["private"]
    assert len(hub.commits) == 1


def test_otherwise_the_owners_settings_decide_who_sees_it(hub, folder):
    push_model(folder, REPOSITORY, hub.url)
    assert not {"private", "visibility"} & set(hub.repositories[REPOSITORY]["asked"])


def test_a_private_model_does_not_go_into_a_public_repository(hub, folder):
    push_model(folder, REPOSITORY, hub.url)
    (folder / "README.md").write_bytes(b"secret")
    refused(push_model, folder, REPOSITORY, hub.url, True, match="public already")
    assert len(hub.commits) == 1


@pytest.mark.parametrize("name", push.NEEDED)
def test_a_folder_without_a_model_is_refused_before_the_hub_is_asked(hub, folder, name):
    (folder / name).unlink()
    refused(push_model, folder, REPOSITORY, hub.url, match=f"no {name}", error=RepositoryError)
    assert hub.asked == []


def test_what_was_taken_out_of_the_folder_stays_unpublished(hub, folder):
    (folder / "metrics.json").unlink()
    (folder / "training.svg").unlink()
    push_model(folder, REPOSITORY, hub.url)
    assert set(UPLOADED) - set(hub.files()) == {"metrics.json", "training.svg"}


STEPS = ["/api/repos/create", "/preupload/", "/objects/batch", "/stored/", "/commit/"]


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_says_why_and_how_to_repeat_it(hub, folder, impatient, step, status):
    hub.refuse = (step, status, {"error": "the hub's own words"})
    before = content(folder)
    message = refused(push_model, folder, REPOSITORY, hub.url, match=f"{status} .*own words")
    assert ("hf auth login" in message) == (status in (401, 403))
    assert f"HF_ENDPOINT={hub.url} hf upload {REPOSITORY} {folder} --include" in message
    assert hub.commits == []
    assert content(folder) == before


def test_repeating_a_step_is_not_told_on_the_terminal(hub, folder, impatient, capfd):
    hub.refuse = ("/preupload/", 500, {})
    refused(push_model, folder, REPOSITORY, hub.url, match="500")
    assert len(impatient) > 1
    assert capfd.readouterr() == ("", "")


def test_the_command_in_the_message_uploads_the_same_files(hub, folder, impatient):
    (folder / "a [1] b*.png").write_bytes(b"\x89PNG odd name")
    hub.refuse = ("/preupload/", 500, {})
    message = refused(push_model, folder, REPOSITORY, hub.url)
    hub.refuse = None
    place, *command = shlex.split(message.partition("To upload it: ")[2])
    command[0] = str(Path(sys.executable).parent / command[0])
    nowhere = {name: closed_port() for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
    off = dict.fromkeys(("XET", "TELEMETRY", "UPDATE_CHECK"), "1")
    environment = {**os.environ, **nowhere, **{f"HF_HUB_DISABLE_{n}": v for n, v in off.items()}}
    environment["HF_HOME"] = str(folder.parent / "home")
    environment["HF_ENDPOINT"] = place.removeprefix("HF_ENDPOINT=")
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
    assert hub.files() == {**UPLOADED, "a [1] b*.png": b"\x89PNG odd name"}


def test_the_command_keeps_a_private_model_private(folder):
    message = refused(push_model, folder, REPOSITORY, closed_port(), True)
    assert message.endswith(" --private")


def test_a_card_the_hub_finds_fault_with_is_told_in_the_log(hub, folder, caplog, capfd):
    hub.card_warnings = ["unknown licence"]
    push_model(folder, REPOSITORY, hub.url)
    assert "unknown licence" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_the_hubs_client_is_left_as_it_was(hub, folder, impatient):
    def state():
        bars = huggingface_hub.utils.are_progress_bars_disabled()
        session = huggingface_hub.get_session()
        return bars, huggingface_hub.logging.get_verbosity(), session.timeout

    before = state()
    push_model(folder, REPOSITORY, hub.url)
    hub.refuse = ("/preupload/", 500, {})
    refused(push_model, folder, REPOSITORY, hub.url)
    assert state() == before


def test_a_check_asks_who_is_logged_in_and_changes_nothing(hub, capfd):
    check_push(REPOSITORY, hub.url)
    assert hub.asked == ["GET /api/whoami-v2"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_check_that_fails_is_not_repeated(hub, status):
    hub.refuse = ("/whoami-v2", status, {"error": "the hub's own words"})
    message = refused(check_push, REPOSITORY, hub.url, match=f"{status} ")
    assert ("hf auth login" in message) == (status in (401, 403))
    assert len(hub.asked) == 1


@pytest.mark.parametrize("answer", [b"<html>Welcome to the airport", ["ada"]])
def test_an_answer_that_is_not_a_hubs_is_refused(hub, answer):
    hub.refuse = ("/whoami-v2", 200, answer)
    refused(check_push, REPOSITORY, hub.url, match="not the answer of a hub")


def test_a_closed_port_is_told_before_a_training():
    refused(check_push, REPOSITORY, closed_port(), match="[Rr]efused")


def test_a_closed_port_is_told_after_a_training(folder):
    message = refused(push_model, folder, REPOSITORY, closed_port(), match="[Rr]efused")
    assert f"complete in {folder}" in message


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_says_nothing_is_not_waited_for(folder, monkeypatch, when):
    monkeypatch.setattr(push, "CHECK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(push, "PUSH_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if when == "before":
            refused(check_push, REPOSITORY, url, match="timed out")
        else:
            refused(push_model, folder, REPOSITORY, url, match="timed out")


def test_a_repository_of_somebody_else_is_refused_before_a_training(hub):
    message = refused(check_push, "bob/coat_toy", hub.url, match="got bob, expected ada or lab")
    assert "hf auth login" in message


def test_a_repository_of_somebody_else_is_refused_after_a_training(hub, folder):
    hub.repositories["bob/coat_toy"] = {"files": {}, "private": False}
    hub.refuse = ("/preupload/", 403, {"error": "not yours"})
    refused(push_model, folder, "bob/coat_toy", hub.url, match="403 Forbidden: not yours")
    assert hub.files("bob/coat_toy") == {}


def test_a_token_that_can_only_read_is_refused_before_a_training(hub):
    hub.account = account(role="read")
    refused(check_push, REPOSITORY, hub.url, match="only read")


@pytest.mark.parametrize("repository", ["lab/coat_toy", "Ada/coat_toy", "club/coat_toy"])
def test_the_owner_may_be_an_organisation_or_what_the_token_is_for(hub, repository):
    scope = {"entity": {"type": "model", "name": "club/coat_toy"}, "permissions": ["repo.write"]}
    hub.account = account(role="fineGrained", fineGrained={"scoped": [scope]})
    check_push(repository, hub.url)


def test_what_a_token_does_not_tell_is_left_to_the_upload(hub):
    hub.account = {"type": "app", "name": "robot"}
    check_push("bob/coat_toy", hub.url)


@pytest.mark.parametrize(
    "name", ["coat_toy", "ada/lite/coat_toy", "ada/coat--toy", "ada/", "/coat", "a\nda/toy", ""]
)
def test_a_name_that_cannot_be_is_refused_before_the_hub_is_asked(hub, folder, name):
    refused(check_push, name, hub.url, match="OWNER/NAME|Name it like", error=UsageError)
    refused(push_model, folder, name, hub.url, match="OWNER/NAME|Name it like", error=UsageError)
    assert hub.asked == []


def test_without_a_login_the_message_says_how_to_get_one(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    for call in ((check_push, REPOSITORY), (push_model, folder, REPOSITORY)):
        message = refused(*call, hub.url, match="no token")
        assert "Run `hf auth login`, or set HF_TOKEN." in message
    assert hub.asked == []


def test_offline_the_message_names_the_variable(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(check_push, REPOSITORY, hub.url, match="HF_HUB_OFFLINE")
    assert hub.asked == []


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refused(check_push, REPOSITORY, error=BackendMissing)
    assert 'pip install "coat-deploy[train]"' in message
