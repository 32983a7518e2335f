import pytest
import yaml

from coat_deploy.kserve.yaml_text import render


@pytest.mark.parametrize(
    "value",
    [
        *("plain", "a/b-c.d_e", "", " ", "true", "No", "null", "~", "1", "0.0", "1e3", "2Gi", "-"),
        *("--port", "a: b", "a #b", 'say "x"', "back\\slash", "two\nlines", "é 🙂", "{x}", "[x]"),
        *("* x", "& x", "! x", "% x", "@x", "`x`", "y", "on", 0, 1, -3, True, False, None),
        *([], {}, ["a"], [["a", "b"], ["c"]], [{"a": 1, "b": [1, 2]}, {}], {"a": {"b": {"c": []}}}),
    ],
)
def test_yaml_reads_any_value_as_it_was(value):
    for document in ({"key": value}, {"list": [value, value]}, {"deep": [{"x": value, "y": 1}]}):
        assert yaml.safe_load(render(document)) == document


@pytest.mark.parametrize("key", ["plain", "nvidia.com/gpu", "a: b", "true", "7", ""])
def test_yaml_reads_any_key_as_it_was(key):
    assert yaml.safe_load(render({key: {key: "x"}})) == {key: {key: "x"}}
