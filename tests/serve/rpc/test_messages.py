"""Our description of the protocol, held against the one that Triton's client brings."""

import importlib.util
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import model_config_pb2, service_pb2

from coat_deploy.serve.rpc.descriptors import DESCRIPTORS
from coat_deploy.serve.rpc.messages import POOL, PROTOCOL

ROOT = Path(__file__).resolve().parents[3]
OURS = POOL.FindFileByName("inference.proto")
THEIRS = {
    **service_pb2.DESCRIPTOR.message_types_by_name,
    **model_config_pb2.DESCRIPTOR.message_types_by_name,
}


def kind(field):
    """What of a field makes the bytes."""
    inner = field.message_type or field.enum_type
    return (
        field.name, field.number, field.type, field.is_repeated,
        inner and inner.full_name, field.containing_oneof and field.containing_oneof.name,
    )  # fmt: skip


def check(ours, theirs):
    assert ours.full_name == theirs.full_name
    for field in ours.fields:
        assert kind(field) == kind(theirs.fields_by_name[field.name])
    for nested in ours.nested_types:
        check(nested, theirs.nested_types_by_name[nested.name])
    for enum in ours.enum_types:
        other = theirs.enum_types_by_name[enum.name]
        assert [(v.name, v.number) for v in enum.values] == [
            (v.name, v.number) for v in other.values
        ]


@pytest.mark.parametrize("name", sorted(OURS.message_types_by_name))
def test_a_message_has_the_names_and_numbers_of_tritons(name):
    check(OURS.message_types_by_name[name], THEIRS[name])


def test_datatypes_have_the_numbers_of_tritons():
    ours, theirs = OURS.enum_types_by_name["DataType"], model_config_pb2.DataType
    assert {value.name: value.number for value in ours.values} == dict(theirs.items())


def test_methods_take_and_give_what_tritons_do():
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert PROTOCOL.full_name == theirs.full_name
    for method in PROTOCOL.methods:
        other = theirs.methods_by_name[method.name]
        for side in ("input_type", "output_type"):
            assert getattr(method, side).full_name == getattr(other, side).full_name
        for side in ("client_streaming", "server_streaming"):
            assert getattr(method, side) == getattr(other, side)


def test_every_field_of_a_request_to_infer_is_known():
    ours = OURS.message_types_by_name["ModelInferRequest"]
    assert {f.name for f in ours.fields} == {f.name for f in THEIRS["ModelInferRequest"].fields}
    raw = ours.fields_by_name["raw_input_contents"]
    assert (raw.number, raw.type) == (7, FieldDescriptor.TYPE_BYTES)


def test_the_descriptors_are_those_of_the_proto_files():
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location(
        "write_protocol", ROOT / "docs" / "write_protocol.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert f'"""\n{DESCRIPTORS.strip()}\n"""' in script.page(), "run: make docs"
