import dataclasses
import errno
import hashlib
import multiprocessing
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from coat_deploy.errors import DownloadError, UsageError
from coat_deploy.network import download
from coat_deploy.network.download import DownloadOptions, default_cache_dir, fetch_official
from coat_deploy.network.variants import VARIANTS, Published

DATA = bytes(range(256)) * 2048  # 512 KiB, several chunks
DIGEST = hashlib.sha256(DATA).hexdigest()
PUBLISHED = Published(0, 0, 0, 0, 0, 0, f"coat_toy_{DIGEST[:8]}.pth")


class Server(ThreadingHTTPServer):
    """Serves `data` under every path, with the faults that a test asks for."""

    daemon_threads = True
    data = DATA
    status = 200
    ranges = True
    wrong_range = False
    says_length = True
    drops: list[int] = []  # bytes after which the next answers break off
    stall_s = 0.0
    redirect = ""

    def __init__(self):
        self.asked: list[str | None] = []
        self.release = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/coat/pretrained/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        wanted = self.headers.get("Range")
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(server.data):
                self.send_error(416)
                return
            self.send_response(206)
            shown = start + 1 if server.wrong_range else start
            end = len(server.data)
            self.send_header("Content-Range", f"bytes {shown}-{end - 1}/{end}")
        else:
            self.send_response(200)
        body = server.data[start:]
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.drops:
            body = body[: server.drops.pop(0)]
        self.wfile.write(body)
        if server.stall_s:
            self.wfile.flush()
            server.release.wait(server.stall_s)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join(timeout=5)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def options(tmp_path, server):
    return DownloadOptions(tmp_path, official_url=server.url, timeout_s=5)


def final(options):
    return options.cache_dir / "official" / PUBLISHED.file


def part(options):
    return final(options).with_name(PUBLISHED.file + ".part")


def keep_part(options, data):
    part(options).parent.mkdir(parents=True)
    part(options).write_bytes(data)


def fails(options, match):
    """Check that the fetch fails in one line, and that nothing has the final name."""
    with pytest.raises(DownloadError, match=match) as caught:
        fetch_official(PUBLISHED, options)
    assert "\n" not in str(caught.value)
    assert not final(options).exists()
    return str(caught.value)


def test_a_file_is_fetched_verified_and_cached(server, options):
    result = fetch_official(PUBLISHED, options)
    assert result.path == final(options)
    assert result.path.read_bytes() == DATA
    assert result.sha256 == DIGEST
    assert result.url == server.url + PUBLISHED.file
    assert not part(options).exists()


def test_a_cached_file_is_not_fetched_again(server, options):
    fetch_official(PUBLISHED, options)
    fetch_official(PUBLISHED, options)
    assert len(server.asked) == 1


def test_a_cached_file_serves_offline_from_a_folder_that_cannot_be_written(options, monkeypatch):
    fetch_official(PUBLISHED, options)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("wrote to the cache"))
    monkeypatch.setattr(download, "_locked", lambda _: pytest.fail("locked the cache"))
    offline = dataclasses.replace(options, offline=True)
    assert fetch_official(PUBLISHED, offline).sha256 == DIGEST


def test_a_damaged_cached_file_is_fetched_again(server, options):
    fetch_official(PUBLISHED, options)
    final(options).write_bytes(DATA[:-1] + b"!")
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA
    assert len(server.asked) == 2


def test_progress_counts_up_to_the_whole_file(options):
    calls = []
    options = dataclasses.replace(options, progress=lambda *call: calls.append(call))
    fetch_official(PUBLISHED, options)
    assert {(name, total) for name, _, total in calls} == {(PUBLISHED.file, len(DATA))}
    done = [done for _, done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == len(DATA)


def test_a_server_that_states_no_length_is_read_to_its_end(server, options):
    server.says_length = False
    totals = set()
    options = dataclasses.replace(options, progress=lambda _, __, total: totals.add(total))
    assert fetch_official(PUBLISHED, options).sha256 == DIGEST
    assert totals == {None}


def test_a_dropped_connection_is_resumed_where_it_broke(server, options):
    server.drops = [100_000, 50_000]
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_connection_that_always_drops_keeps_the_part_for_the_next_call(server, options):
    server.drops = [1000] * download.MAX_CONNECTIONS
    fails(options, r"connection closed at 5000 of 524288 bytes; run again to resume")
    assert part(options).read_bytes() == DATA[:5000]
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA
    assert server.asked[-1] == "bytes=5000-"


def test_a_part_is_started_anew_where_the_server_knows_no_ranges(server, options):
    server.ranges = False
    keep_part(options, DATA[:1234])
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA
    assert server.asked == ["bytes=1234-"]


def test_a_server_that_sends_another_range_is_asked_for_all(server, options):
    server.wrong_range = True
    keep_part(options, DATA[:1234])
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA
    assert server.asked == ["bytes=1234-", None]


def test_a_part_that_is_complete_only_gets_its_name(server, options):
    keep_part(options, DATA)
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA


@pytest.mark.parametrize("data", [b"x" * 1234, DATA + b"x", b"x" * len(DATA)])
def test_a_damaged_part_is_thrown_away_once(server, options, data):
    keep_part(options, data)
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA
    assert len(server.asked) == 2


def test_a_file_that_was_not_published_shows_both_hashes(server, options):
    server.data = DATA[:-1] + b"!"
    message = fails(options, "not the published file")
    assert hashlib.sha256(server.data).hexdigest() in message
    assert f"expected {DIGEST[:8]}..." in message
    assert not part(options).exists()
    assert len(server.asked) == 1


def test_a_truncated_file_on_the_server_is_not_accepted(server, options):
    server.data = DATA[:-100]
    fails(options, "not the published file")


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_http_errors_say_what_to_fetch_and_where_to_put_it(server, options, status):
    server.status = status
    message = fails(options, f"HTTP {status}")
    assert server.url + PUBLISHED.file in message
    assert f"save it as {final(options)}" in message
    assert "--weights PATH" in message


def test_a_refused_connection_says_what_to_fetch_and_where_to_put_it(options):
    with Server() as gone:
        url = gone.url
    message = fails(dataclasses.replace(options, official_url=url), "[Rr]efused")
    assert f"Fetch {url}{PUBLISHED.file} on another machine" in message
    assert f"save it as {final(options)}" in message


def test_an_unknown_host_is_one_line(options):
    """`.invalid` never resolves (RFC 6761)."""
    fails(dataclasses.replace(options, official_url="http://coat.invalid/"), "cannot be fetched")


def test_offline_asks_no_server(server, options):
    message = fails(dataclasses.replace(options, offline=True), "offline")
    assert f"save it as {final(options)}" in message
    assert server.asked == []


def test_a_file_put_where_the_message_says_is_taken(server, options):
    final(options).parent.mkdir()
    final(options).write_bytes(DATA)
    assert fetch_official(PUBLISHED, options).sha256 == DIGEST
    assert server.asked == []


def test_a_server_that_falls_silent_is_given_up(server, options, monkeypatch):
    monkeypatch.setattr(download, "MAX_CONNECTIONS", 2)
    server.drops, server.stall_s = [1000, 1000], 5
    fails(dataclasses.replace(options, timeout_s=0.2), "connection lost at 2000 bytes: timed out")
    assert part(options).read_bytes() == DATA[:2000]


def test_a_file_larger_than_any_coat_is_refused_before_it_is_transferred(
    server, options, monkeypatch
):
    monkeypatch.setattr(download, "MAX_FILE_BYTES", 1000)
    fails(options, "524288 bytes, more than 1000")
    assert not part(options).exists()


def test_a_file_that_hides_its_size_is_cut_off(server, options, monkeypatch):
    monkeypatch.setattr(download, "MAX_FILE_BYTES", 300_000)
    server.says_length = False
    fails(options, "more than 300000 bytes")


def test_control_c_leaves_a_part_that_resumes(server, options):
    def interrupt(_, done, __):
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_official(PUBLISHED, dataclasses.replace(options, progress=interrupt))
    assert not final(options).exists()
    kept = part(options).read_bytes()
    assert len(kept) > 200_000
    assert kept == DATA[: len(kept)]
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA
    assert server.asked[1] == f"bytes={len(kept)}-"


def test_a_full_disk_leaves_a_part_that_resumes(server, options, monkeypatch):
    write, calls = download._write, []

    def full(file, chunk):
        calls.append(chunk)
        if len(calls) == 2:
            file.write(chunk[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, chunk)

    monkeypatch.setattr(download, "_write", full)
    monkeypatch.setattr(download, "CHUNK_BYTES", 4096)
    fails(options, r"cannot be written \(No space left on device\).*COAT_CACHE")
    monkeypatch.undo()
    kept = part(options).read_bytes()
    assert kept == DATA[: len(kept)]
    assert fetch_official(PUBLISHED, options).path.read_bytes() == DATA


def test_a_cache_that_cannot_be_made_is_named(tmp_path, options):
    (tmp_path / "official").write_bytes(b"a file, not a folder")
    with pytest.raises(DownloadError, match=r"official.*cannot be written"):
        fetch_official(PUBLISHED, options)


def _fetch_in_process(cache_dir, url, results):
    os.environ["no_proxy"] = "127.0.0.1"
    result = fetch_official(PUBLISHED, DownloadOptions(cache_dir, official_url=url))
    results.put(result.sha256)


def test_processes_at_once_fetch_one_file_once(server, options):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (options.cache_dir, server.url, results)
    processes = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    digests = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert digests == [DIGEST] * 3
    assert final(options).read_bytes() == DATA
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["file:///etc/", "ftp://127.0.0.1/", "/tmp/"])
def test_only_web_addresses_are_fetched(options, url):
    with pytest.raises(UsageError, match="not an http or https address"):
        fetch_official(PUBLISHED, dataclasses.replace(options, official_url=url))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirects_lead_to_web_addresses_only(server, options, target):
    server.redirect = target
    fails(options, "cannot be fetched")


def test_a_redirect_never_leaves_https():
    request = download.urllib.request.Request("https://example.org/a")
    with pytest.raises(OSError, match="redirected from https to http://"):
        download._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/a")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("COAT_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("COAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "coat-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "coat-deploy"


def test_the_default_address_is_the_published_one(monkeypatch):
    monkeypatch.delenv("COAT_OFFICIAL_URL", raising=False)
    published = VARIANTS["coat_tiny"].published
    assert DownloadOptions().official_url + published.file == published.url
    monkeypatch.setenv("COAT_OFFICIAL_URL", "https://mirror.example.org/")
    assert DownloadOptions().official_url == "https://mirror.example.org/"
