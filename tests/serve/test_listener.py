"""The listening socket: bound, and closed so that nobody is reset."""

import asyncio
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from coat_deploy.errors import ServerError
from coat_deploy.serve.listener import bind, emptied, turn_away
from coat_deploy.serve.options import ListenOptions


def speaks_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


# A machine may have no IPv6, and other systems than Linux have no such filter: there the server
# does without.
HOSTS = (
    "127.0.0.1",
    pytest.param("::1", marks=pytest.mark.skipif(not speaks_ipv6(), reason="needs IPv6")),
)
filtered = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's filter of packets")


@pytest.fixture(params=HOSTS)
def place(request):
    with bind(ListenOptions(host=request.param, port=0)) as bound:
        bound.listen(64)
        yield bound


def connect(place, timeout=10.0):
    return socket.create_connection(place.getsockname()[:2], timeout)


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match="cannot listen there .* Choose another --port"):
            bind(ListenOptions(port=port))


@filtered
def test_no_connection_begins_any_more_and_those_that_have_go_on(place):
    with connect(place) as early:
        turn_away([place])
        with pytest.raises(TimeoutError):
            connect(place, 0.3)
        taken, _ = place.accept()
        with taken:
            early.sendall(b"x" * 100_000)
            early.shutdown(socket.SHUT_WR)
            taken.setblocking(True)
            received = b""
            while part := taken.recv(1 << 16):
                received += part
    assert received == b"x" * 100_000


@filtered
def test_who_tries_while_turned_away_is_refused_when_the_socket_is_closed(place):
    turn_away([place])
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(connect, place)
        time.sleep(0.2)
        place.close()
        with pytest.raises(ConnectionRefusedError):
            late.result()


def test_whoever_waits_is_taken_before_the_wait_is_over(place):
    waiting = [connect(place) for _ in range(40)]
    taken = []

    async def serve():
        server = await asyncio.start_server(lambda reader, writer: taken.append(writer), sock=place)
        await emptied([place], 10)
        server.close()
        await asyncio.sleep(0.1)
        assert len(taken) == len(waiting)
        for writer in taken:
            writer.close()

    asyncio.run(serve())
    for each in waiting:
        each.close()


def test_the_wait_for_a_socket_that_nobody_empties_ends(place):
    with connect(place):
        asyncio.run(emptied([place], 0.05))
