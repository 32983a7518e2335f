"""Messages that are broken in some way: a status that is the client's to mend, and the next call's
answer is its own."""

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coat_deploy.serve.requests import BYTES, DATATYPES
from coat_deploy.serve.rpc.messages import InferReply, InferRequestMessage

NAME = "coat_lite_toy"
SERVICE = "/inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"
SHAPE = (1, 3, 64, 64)
CLIENTS = 4
PIXELS = np.random.default_rng(2).standard_normal((CLIENTS, *SHAPE)).astype(np.float32)
OURS = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "ABORTED"}
"""Statuses by which a server says that it failed."""
WAIT_S = 30


def message(client=0, **changes):
    """A request to infer; `changes` are fields of its one input."""
    found = InferRequestMessage(model_name=NAME)
    found.inputs.add(**{"name": "pixels", "datatype": "FP32", "shape": SHAPE, **changes})
    found.raw_input_contents.append(PIXELS[client].tobytes())
    return found


VALID = message().SerializeToString()
FRONT = len(VALID) - PIXELS[0].nbytes  # where the pixels begin
INT32, INT64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
CONTENTS = {
    "bool_contents": st.booleans(),
    "int_contents": INT32,
    "int64_contents": INT64,
    "uint_contents": st.integers(0, 2**32 - 1),
    "uint64_contents": st.integers(0, 2**64 - 1),
    "fp32_contents": st.floats(width=32),
    "fp64_contents": st.floats(),
    "bytes_contents": st.binary(max_size=9),
}
PARAMETER = st.one_of(
    st.builds(lambda v: {"bool_param": v}, st.booleans()),
    st.builds(lambda v: {"int64_param": v}, INT64.filter(lambda v: not 0 <= v < 6)),
    st.builds(lambda v: {"double_param": v}, st.floats()),
    st.builds(lambda v: {"string_param": v}, st.text(max_size=9)),
    st.just({}),
)


def raw(contents):
    found = message()
    del found.raw_input_contents[:]
    found.raw_input_contents.extend(contents)
    return found


def typed(datatype, shape, fields, with_raw):
    """An input whose contents may be of several datatypes, beside raw ones or not."""
    found = message(datatype=datatype, shape=shape)
    if not with_raw:
        del found.raw_input_contents[:]
    for field, values in fields.items():
        getattr(found.inputs[0].contents, field).extend(values)
    return found


def with_parameter(key, value):
    found = message()
    wanted = found.outputs.add(name="logits")
    for name, content in value.items():
        setattr(wanted.parameters[key], name, content)
    if not value:
        wanted.parameters[key].SetInParent()
    return found


BROKEN = st.one_of(
    st.lists(st.binary(max_size=99), max_size=3).map(raw),
    st.integers(0, PIXELS[0].nbytes - 1).map(lambda end: raw([PIXELS[0].tobytes()[:end]])),
    st.binary(min_size=1, max_size=9).map(lambda more: raw([PIXELS[0].tobytes() + more])),
    st.sampled_from([np.nan, np.inf]).map(lambda v: raw([np.full(SHAPE, v, "f4").tobytes()])),
    st.lists(INT64, max_size=10)
    .filter(lambda shape: shape != list(SHAPE))
    .map(lambda shape: message(shape=shape)),
    st.sampled_from(sorted({*DATATYPES, BYTES} - {"FP32"})).map(lambda d: message(datatype=d)),
    st.text(max_size=9).map(lambda text: message(datatype=text)),
    st.text(max_size=9).map(lambda text: message(name=text)),
    st.builds(
        typed,
        st.sampled_from([*DATATYPES, BYTES]),
        st.lists(st.integers(0, 3), max_size=3),
        st.fixed_dictionaries(
            {}, optional={k: st.lists(v, max_size=9) for k, v in CONTENTS.items()}
        ),
        st.booleans(),
    ),
    st.builds(with_parameter, st.just("classification"), PARAMETER),
).map(lambda found: found.SerializeToString())
"""Requests to infer, each of which breaks a rule."""


@st.composite
def mangled(draw):
    """A request with some bytes in front of its pixels changed, left out or put in."""
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, FRONT - 1))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


@pytest.fixture
def channel(listening):
    with grpc.insecure_channel(listening().address) as found:
        yield found


def status(channel, content, path=INFER):
    """The status of a call, and what it says."""
    try:
        channel.unary_unary(path)(content, timeout=WAIT_S)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


def logits(channel, client):
    reply = InferReply.FromString(
        channel.unary_unary(INFER)(message(client).SerializeToString(), timeout=WAIT_S)
    )
    return np.frombuffer(reply.raw_output_contents[0], np.float32)


def test_what_is_malformed_gets_a_sentence_and_the_next_its_own_answer(channel, caplog):
    expected = [logits(channel, i) for i in range(CLIENTS)]
    assert len({row.tobytes() for row in expected}) == CLIENTS

    @settings(max_examples=200)
    @given(BROKEN, st.integers(0, CLIENTS - 1))
    def holds(content, number):
        code, said = status(channel, content)
        assert code == "INVALID_ARGUMENT", (code, said)
        assert said.endswith((".", "?")) and "Traceback" not in said and len(said) < 1000
        np.testing.assert_array_equal(logits(channel, number), expected[number])

    holds()
    assert not caplog.records


def test_messages_of_any_bytes_break_nothing(channel, caplog):
    @settings(max_examples=200)
    @given(mangled() | st.binary(max_size=99))
    def holds(content):
        code, said = status(channel, content)
        assert code not in OURS, (code, said)

    holds()
    assert logits(channel, 0).shape == (5,)
    assert not caplog.records


METHODS = (
    *(f"{SERVICE}/{name}" for name in (
        "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig",
        "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
    )),
    "/grpc.health.v1.Health/Check",
)  # fmt: skip
STREAMS = (
    f"{SERVICE}/ModelStreamInfer",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


def test_other_methods_take_any_bytes_too(channel, caplog):
    @settings(max_examples=200)
    @given(st.sampled_from(METHODS), st.binary(max_size=40))
    def holds(path, content):
        code, said = status(channel, content, path)
        assert code not in OURS, (path, code, said)

    holds()
    assert not caplog.records


def test_streams_take_any_bytes_too(channel, caplog):
    @settings(max_examples=100)
    @given(st.sampled_from(STREAMS), st.lists(st.binary(max_size=40) | mangled(), max_size=4))
    def holds(path, contents):
        try:
            answers = list(channel.stream_stream(path)(iter(contents), timeout=WAIT_S))
        except grpc.RpcError as error:
            assert error.code().name not in OURS, (path, error.code(), error.details())
        else:
            assert len(answers) == len(contents)

    holds()
    assert not caplog.records
