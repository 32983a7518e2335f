import json

import pytest
from google.protobuf import struct_pb2, text_format

from coat_deploy.triton.pbtxt import Word, map_of, render


def test_fields_are_written_one_a_line():
    message = {"name": "x", "n": -1, "on": True, "kind": Word("GPU"), "dims": [1, 2], "none": []}
    assert render(message) == 'name: "x"\nn: -1\non: true\nkind: GPU\ndims: [1, 2]\n'


def test_messages_and_lists_of_them_are_indented():
    inner = {"a": {"b": {"c": 1}}, "d": [{"e": 1}, {"e": 2}]}
    assert render(inner) == "a {\n  b {\n    c: 1\n  }\n}\nd {\n  e: 1\n}\nd {\n  e: 2\n}\n"


@pytest.mark.parametrize("text", ['"', "\\", "a\nb\t\r", "é 漢 🙂", "\x01", "'", "#", "a\\n"])
def test_protobuf_reads_any_text_as_it_was(text):
    message = {"fields": map_of({text: {"string_value": text}})}
    read = text_format.Parse(render(message), struct_pb2.Struct())
    assert dict(read) == {text: text}, json.dumps(text)
