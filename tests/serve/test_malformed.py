"""Requests that are broken in some way, on connections that go on: a sentence for each, no failure
of the server, and the next request's answer is its own."""

import gzip
import json
import socket
import zlib
from contextlib import closing, suppress
from http.client import HTTPConnection

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coat_deploy.serve.binary import HEADER_LENGTH, pack_items
from coat_deploy.serve.requests import DATATYPES

NAME = "coat_lite_toy"
INFER = f"/v2/models/{NAME}/infer"
SHAPE = (1, 3, 64, 64)
CLIENTS = 4
PIXELS = np.random.default_rng(1).standard_normal((CLIENTS, *SHAPE)).astype(np.float32)
TAIL = PIXELS[0].tobytes()


def head(**changes):
    parameters = {"binary_data_size": PIXELS[0].nbytes}
    fields = {"name": "pixels", "datatype": "FP32", "shape": list(SHAPE), "parameters": parameters}
    return fields | changes


def request(*heads, tail=TAIL, length=None, **headers):
    """A body and its headers; `heads` are the inputs, or the whole text as bytes."""
    text = heads[0] if isinstance(heads[0], bytes) else json.dumps({"inputs": list(heads)}).encode()
    length = str(len(text) if length is None else length)
    return text + tail, {HEADER_LENGTH: length, **headers}


VALID, _ = request(head())
TEXT = VALID[: -PIXELS[0].nbytes]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
OTHER_SIZES = (
    st.integers().filter(lambda size: size != PIXELS[0].nbytes) | st.floats() | st.text(max_size=5)
    | st.booleans() | st.lists(st.integers(), max_size=2)
)  # fmt: skip


def other_length():
    right = len(TEXT)
    lengths = st.integers(-9, 2 * len(VALID)).filter(lambda n: n not in (0, right)) | st.text(
        st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9
    ).filter(lambda text: not text.isdigit())
    return lengths.map(lambda length: request(head(), length=length))


def of_other_fields():
    """An input one of whose fields is any JSON."""

    def change(field, value):
        parameters = {"binary_data_size": value} if field == "size" else None
        return request(head(parameters=parameters) if field == "size" else head(**{field: value}))

    fields = st.sampled_from(["name", "datatype", "shape", "parameters"])
    wrong = JSON.filter(lambda value: value != list(SHAPE) and value != [1.0, 3, 64, 64])
    return st.builds(change, fields, wrong) | st.builds(change, st.just("size"), OTHER_SIZES)


def of_two_inputs():
    """Inputs of one name, or that overlap, or together go beyond the end."""
    size = PIXELS[0].nbytes

    def build(first, second, name):
        parts = [{"binary_data_size": part} for part in (first, second)]
        return request(head(parameters=parts[0]), head(name=name, parameters=parts[1]))

    sizes = st.sampled_from([0, 1, size // 2, size - 1, size, size + 1, 2 * size, 2**63, -size])
    return st.builds(build, sizes, sizes, st.sampled_from(["pixels", "image", "other"]))


def packed(kind):
    """A packed body, cut short, prolonged, or another inside."""
    whole = gzip.compress(VALID, 1, mtime=0) if kind == "gzip" else zlib.compress(VALID, 1)
    cut = st.integers(1, len(whole) - 1).map(lambda end: whole[:end])
    longer = st.binary(min_size=1, max_size=9).map(lambda more: whole + more)
    twice = st.just(whole + whole)
    plain = st.just(VALID)
    headers = {HEADER_LENGTH: str(len(TEXT)), "content-encoding": kind}
    return (cut | longer | twice | plain).map(lambda content: (content, headers))


def nested(depth, closed):
    text = b'{"inputs":' + b"[" * depth + (b"]" * depth + b"}" if closed else b"")
    return request(text, tail=b"")


BROKEN = st.one_of(
    st.integers(0, len(VALID) - 1).map(lambda end: (VALID[:end], request(head())[1])),
    st.binary(min_size=1, max_size=20).map(lambda more: (VALID + more, request(head())[1])),
    other_length(),
    of_other_fields(),
    of_two_inputs(),
    packed("gzip"),
    packed("deflate"),
    st.sampled_from(["br", "zstd", "gzip, gzip", "", "\xff"]).map(
        lambda kind: request(head(), **{"content-encoding": kind})
    ),
    st.builds(nested, st.sampled_from([40, 900, 5000, 100_000]), st.booleans()),
    st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xfe\xff"]).map(
        lambda bad: request(TEXT.replace(b"pixels", bad))
    ),
    st.sampled_from([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"1" * 5000]).map(
        lambda number: request(TEXT.replace(b"64", number))
    ),
    st.sampled_from([np.nan, np.inf, -np.inf]).map(
        lambda value: request(head(), tail=np.full(SHAPE, value, np.float32).tobytes())
    ),
    st.builds(
        lambda name, text: request(head(name="image", **name), tail=text),
        st.just({"datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 12}}),
        st.binary(min_size=12, max_size=12),
    ),
    st.sampled_from(sorted(set(DATATYPES) - {"FP32"})).map(
        lambda kind: request(head(datatype=kind))
    ),
    JSON.map(lambda document: request(json.dumps(document).encode(), tail=b"")),
    st.binary(max_size=99).map(lambda content: (content, {})),
    st.binary(max_size=99).map(lambda content: request(pack_items([content]), tail=b"")),
)
"""Bodies and headers, each of which breaks a rule."""


def numbers(answer, content):
    length = int(answer.headers[HEADER_LENGTH])
    return np.frombuffer(content[length:], np.float32)


class Client:
    """One connection, kept for as long as the server keeps it."""

    def __init__(self, port):
        self._connection = HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, body, headers):
        self._connection.request("POST", INFER, body, headers)
        answer = self._connection.getresponse()
        return answer, answer.read()

    def logits(self, client):
        answer, content = self.ask(PIXELS[client].tobytes(), {HEADER_LENGTH: "0"})
        assert answer.status == 200, content
        return numbers(answer, content)

    def close(self):
        self._connection.close()


@pytest.fixture
def server(running):
    return running("--no-access-log")


def test_what_is_malformed_gets_a_sentence_and_the_next_its_own_answer(server):
    with closing(Client(server.port)) as client:
        expected = [client.logits(i) for i in range(CLIENTS)]
        assert len({row.tobytes() for row in expected}) == CLIENTS

        @settings(max_examples=200)
        @given(BROKEN, st.integers(0, CLIENTS - 1))
        def holds(broken, number):
            answer, content = client.ask(*broken)
            assert 400 <= answer.status < 500, (answer.status, content)
            assert answer.headers["content-type"] == "application/json"
            (sentence,) = json.loads(content).values()
            assert len(sentence) < 1000 and "Traceback" not in sentence and ".py" not in sentence
            assert sentence.endswith((".", "?"))
            np.testing.assert_array_equal(client.logits(number), expected[number])

        holds()
    status, said = server.end()
    assert status == 0 and "Traceback" not in said, said


RAW = (
    f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(VALID)}\r\n"
    f"{HEADER_LENGTH}: {len(TEXT)}\r\n\r\n"
).encode()


@st.composite
def mangled(draw):
    """A head of a request with some bytes changed, left out or put in."""
    content = bytearray(RAW)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


ODD_HEADS = (
    b"GET /v2/\xff\xfe HTTP/1.1\r\n\r\n",
    b"GET /v2/models/%ff%fe HTTP/1.1\r\n\r\n",
    b"GET /models?top_k=%00%ff HTTP/1.1\r\n\r\n",
    b"GET http://elsewhere/v2 HTTP/1.1\r\n\r\n",
    b"GET //v2 HTTP/1.1\r\n\r\n",
    b"GET ?x HTTP/1.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\n\r\n",
    b"CONNECT elsewhere:80 HTTP/1.1\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /v2 HTTP/9.9\r\n\r\n",
    b"GET /v2\r\n\r\n",
    b"POST /v2/repository/index HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v2/repository/index HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"POST /v2/repository/index HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}",
    b"POST /v2/repository/index HTTP/1.1\r\nContent-Length: +2\r\n\r\n{}",
    b"POST /v2/repository/index HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    b"POST /v2/repository/index HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"ffffffffffffffffff\r\n{}",
    b"POST /v2/repository/index HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n"
    b"{}",
    b"GET /v2 HTTP/1.1\r\nA: " + bytes(9) + b"\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nAuthorization: \xff\xfe\r\nX-Request-Id: \xff\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * 2000 + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the begin of TLS
)


def statuses(port, content):
    """The statuses that are answered on a connection that sends this and no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        answer = b""
        with suppress(OSError):  # the server may have closed it, with a part of this unread
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                answer += part
    found = []
    for piece in answer.split(b"HTTP/1.1 ")[1:]:
        found.append(int(piece[:3]))
        assert b"Traceback" not in piece and (found[-1] < 400 or b'{"error":' in piece)
    return found


def test_heads_of_any_bytes_break_nothing(server):
    @settings(max_examples=200)
    @given(mangled() | st.sampled_from(ODD_HEADS) | st.binary(max_size=200))
    def holds(content):
        assert all(status < 500 for status in statuses(server.port, content + VALID[len(TEXT) :]))

    holds()
    for content in ODD_HEADS:
        assert all(status < 500 for status in statuses(server.port, content)), content
    with closing(Client(server.port)) as client:
        assert len(client.logits(0)) == 5
    status, said = server.end()
    assert status == 0 and "Traceback" not in said, said
