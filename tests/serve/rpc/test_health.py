import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

NAME = "coat_lite_toy"
WAIT_S = 30
State = health_pb2.HealthCheckResponse


@pytest.fixture
def server(listening):
    return listening(allow_load=True)


@pytest.fixture
def health(server):
    with grpc.insecure_channel(server.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def asked(name=""):
    return health_pb2.HealthCheckRequest(service=name)


@pytest.mark.parametrize("name", ["", "inference.GRPCInferenceService", NAME])
def test_what_is_served_is_healthy(health, name):
    assert health.Check(asked(name), timeout=WAIT_S).status == State.SERVING


def test_a_name_that_is_not_served_is_not_found(health):
    with pytest.raises(grpc.RpcError) as error:
        health.Check(asked("no_such"), timeout=WAIT_S)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_all_states_are_listed(health):
    found = health.List(health_pb2.HealthListRequest(), timeout=WAIT_S).statuses
    assert {name: state.status for name, state in found.items()} == dict.fromkeys(
        ["", "inference.GRPCInferenceService", NAME, "coat_toy"], State.SERVING
    )


def test_a_server_that_drains_is_not_healthy_but_answers(server, health):
    server.service.drain()
    for name in ("", NAME):
        assert health.Check(asked(name), timeout=WAIT_S).status == State.NOT_SERVING


def test_a_watcher_hears_of_changes_and_of_the_end(server, health):
    told = health.Watch(asked(NAME), timeout=WAIT_S)
    assert next(told).status == State.SERVING
    server.run(server.service.unload(NAME))
    assert next(told).status == State.NOT_SERVING
    server.run(server.service.load(NAME))
    assert next(told).status == State.SERVING
    ended = server.begin(server.server.stop(WAIT_S))
    assert next(told).status == State.NOT_SERVING
    with pytest.raises(grpc.RpcError) as error:
        next(told)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    ended.result(WAIT_S / 2)


def test_a_name_that_is_not_known_is_watched(health):
    told = health.Watch(asked("no_such"), timeout=WAIT_S)
    assert next(told).status == State.SERVICE_UNKNOWN
    told.cancel()


def test_reflection_tells_of_the_services_and_their_messages(server):
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "inference.GRPCInferenceService",
        }
        file = database.FindFileContainingSymbol("inference.ModelInferRequest")
        assert "GRPCInferenceService" in [service.name for service in file.service]
        file = database.FindFileContainingSymbol("grpc.health.v1.Health")
        assert file.name == "grpc/health/v1/health.proto" or file.package == "grpc.health.v1"


def test_reflection_ends_with_the_server(server):
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert database.get_services()
        server.run(server.server.stop(WAIT_S))
