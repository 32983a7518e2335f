import random

import pytest

from coat_deploy.errors import RequestError
from coat_deploy.serve.rpc.messages import InferRequestMessage
from coat_deploy.serve.rpc.wire import MAX_FIELDS, split


def test_raw_contents_are_taken_out_and_all_else_is_left():
    whole = InferRequestMessage(model_name="a", id="é", raw_input_contents=[b"", b"x" * 300])
    whole.inputs.add(name="pixels", datatype="FP32", shape=[1, 3, 64, 64])
    whole.parameters["timeout"].int64_param = 5
    rest, raw = split(whole.SerializeToString())
    assert [bytes(item) for item in raw] == [b"", b"x" * 300]
    found = InferRequestMessage.FromString(rest)
    assert not found.raw_input_contents
    found.raw_input_contents.extend([b"", b"x" * 300])
    assert found == whole


def test_raw_contents_are_not_copied():
    content = InferRequestMessage(raw_input_contents=[b"x" * 300]).SerializeToString()
    (raw,) = split(content)[1]
    assert raw.obj is content


def test_fields_of_other_versions_of_the_protocol_are_passed_over():
    # 15: a varint, 16: eight bytes, 17: four, and the name of a model behind them
    unknown = b"\x78\x96\x01" + b"\x81\x01" + bytes(8) + b"\x8d\x01" + bytes(4)
    rest, raw = split(unknown + b"\x0a\x01a")
    assert InferRequestMessage.FromString(rest).model_name == "a" and raw == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x0a",  # no length
        b"\x0a\x05abc",  # cut short
        b"\x0b",  # a group
        b"\x0f",  # no such kind
        b"\x02\x00",  # field 0
        b"\x78" + b"\x80" * 11,  # a number without an end
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # longer than any message
        b"\x81\x01\x00",  # eight bytes cut short
        b"\xff\xd8\xff\xe0 a JPEG file",
    ],
)
def test_what_is_no_message_is_refused(content):
    with pytest.raises(RequestError, match="is not a ModelInferRequest") as error:
        split(content)
    assert error.value.kind == "invalid"


def test_a_message_of_many_parts_is_refused_before_it_is_read():
    split(b"\x2a\x00" * MAX_FIELDS)
    with pytest.raises(RequestError, match="too many parts"):
        split(b"\x2a\x00" * (MAX_FIELDS + 1))


def test_any_bytes_are_split_or_refused():
    chance = random.Random(0)
    sound = InferRequestMessage(model_name="a", raw_input_contents=[b"xyz"])
    sound.inputs.add(name="pixels", datatype="FP32", shape=[1, 3])
    sound = sound.SerializeToString()
    refused = 0
    for _ in range(2000):
        content = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            split(bytes(content[: chance.randint(0, len(content))]))
        except RequestError as error:
            refused += 1
            assert error.kind == "invalid"
    assert 0 < refused < 2000
