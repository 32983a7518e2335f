"""Tensors in binary: written and read back, and bytes that are none."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coat_deploy.errors import RequestError
from coat_deploy.serve.binary import (
    MAX_HEADER_LENGTH,
    header_length,
    pack_items,
    read_inputs,
    read_tensor,
    split,
    tensor_bytes,
)
from coat_deploy.serve.requests import BYTES, DATATYPES, Tensor
from coat_deploy.serve.tensors_json import InferDocument, TensorHead

SHAPES = hnp.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3)


@st.composite
def tensors(draw, name="x"):
    """A tensor of any datatype and shape."""
    datatype, shape = draw(st.sampled_from([*DATATYPES, BYTES])), draw(SHAPES)
    if datatype == BYTES:
        size = math.prod(shape)
        items = st.lists(st.binary(max_size=20), min_size=size, max_size=size)
        return Tensor(name, BYTES, shape, draw(items if size < 50 else st.just([b"ab"] * size)))
    return Tensor(name, datatype, shape, draw(hnp.arrays(DATATYPES[datatype], shape)))


def head(tensor, size=None):
    parameters = {} if size is None else {"binary_data_size": size}
    return TensorHead(tensor.name, tensor.datatype, tensor.shape, parameters, None)


def same(one, other):
    """To the bit, NaNs included."""
    assert (one.name, one.datatype, one.shape) == (other.name, other.datatype, other.shape)
    if one.datatype == BYTES:
        assert list(one.data) == list(other.data)
    else:
        assert one.data.dtype == other.data.dtype and one.data.shape == other.data.shape
        assert one.data.tobytes() == other.data.tobytes()


@given(tensors())
def test_what_is_written_is_read(tensor):
    content = tensor_bytes(tensor)
    same(read_tensor(head(tensor), memoryview(content)), tensor)


@given(st.lists(tensors(), max_size=4), st.binary(max_size=40))
def test_each_input_gets_its_own_bytes(found, front):
    named = [Tensor(str(i), t.datatype, t.shape, t.data) for i, t in enumerate(found)]
    contents = [tensor_bytes(tensor) for tensor in named]
    heads = tuple(head(t, len(c)) for t, c in zip(named, contents, strict=True))
    document = InferDocument("", heads, (), frozenset(), False, None)
    json, tail = split(memoryview(front + b"".join(contents)), len(front))
    assert bytes(json) == front
    for one, other in zip(read_inputs(document, tail), named, strict=True):
        same(one, other)


@given(tensors(), st.data())
def test_bytes_of_another_length_are_none_of_it(tensor, data):
    content = tensor_bytes(tensor)
    cut = data.draw(st.integers(0, len(content)))
    other = content[:cut] + data.draw(st.binary(max_size=9))
    if len(other) == len(content):
        return
    with pytest.raises(RequestError) as error:
        read_tensor(head(tensor), memoryview(other))
    assert error.value.kind == "invalid"


@given(st.integers(0, 6), st.binary(max_size=60))
def test_any_bytes_are_items_or_refused(count, content):
    shape = (count,)
    try:
        found = read_tensor(TensorHead("x", BYTES, shape, {}, None), memoryview(content))
    except RequestError as error:
        assert error.kind == "invalid"
    else:
        assert len(found.data) == count and pack_items(found.data) == content


@given(st.text(max_size=30) | st.integers().map(str))
def test_a_length_is_a_whole_number_or_refused(text):
    try:
        found = header_length(text)
    except RequestError as error:
        assert error.kind == "invalid"
    else:
        assert found == int(text) and 0 <= found <= MAX_HEADER_LENGTH
