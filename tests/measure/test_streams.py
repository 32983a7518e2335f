import gc
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from coat_deploy.measure.streams import Flow, Streams, summarise

WAIT_S = 20
SECOND = 10**9


@pytest.fixture
def streams() -> Iterator[Callable[..., Streams]]:
    """Return `open(*steps)`; the threads of what is opened are ended."""
    opened: list[Streams] = []

    def start(*steps: Callable[[], object]) -> Streams:
        opened.append(Streams(steps))
        return opened[-1]

    yield start
    for flows in opened:
        flows.close()


def times(*requests: tuple[int, int]) -> np.ndarray:
    return np.array(requests, np.int64)


def test_requests_of_all_streams_count() -> None:
    two, one = times((0, SECOND), (SECOND, 2 * SECOND)), times((0, 2 * SECOND))
    assert summarise([two, one], 0, 2 * SECOND).requests_per_second == pytest.approx(1.5)


def test_a_request_counts_with_the_share_of_it_that_lies_inside() -> None:
    around = times((-SECOND, 0), (0, 4 * SECOND), (4 * SECOND, 5 * SECOND))
    assert summarise([around], SECOND, 4 * SECOND).requests_per_second == pytest.approx(0.25)


def test_time_between_requests_of_a_stream_counts() -> None:
    with_pauses = times((0, SECOND // 10), (9 * SECOND // 10, SECOND))
    assert summarise([with_pauses], 0, SECOND).requests_per_second == pytest.approx(2)


def test_streams_that_take_turns_are_no_faster_than_one() -> None:
    # One works for the first second while the other waits, then the other way round.
    first = times((0, SECOND // 2), (SECOND // 2, SECOND), (SECOND, 5 * SECOND // 2))
    second = times((0, 3 * SECOND // 2), (3 * SECOND // 2, 2 * SECOND))
    both = summarise([first, second], 0, 2 * SECOND)
    assert both.requests_per_second == pytest.approx(2, rel=0.2)


def test_latencies_are_of_requests_that_lie_inside_altogether() -> None:
    ms = 10**6
    flow = summarise(
        [times((-ms, 0), (0, ms), (ms, 3 * ms)), times((5, 5 + 4 * ms), (6 * ms, 9 * ms))],
        0,
        7 * ms,
    )
    assert flow.latencies_ms.tolist() == [1.0, 2.0, 4.0]


def test_streams_run_at_once(streams: Callable[..., Streams]) -> None:
    met = threading.Barrier(3)
    waiting = [True, True, True]

    def step(number: int) -> None:
        if waiting[number]:
            waiting[number] = False
            met.wait(WAIT_S)  # raises when the others do not come

    flow = streams(*(lambda n=n: step(n) for n in range(3))).flow(0)
    assert flow.requests_per_second > 0


def test_a_step_stays_in_one_thread_and_the_first_in_that_of_the_caller(
    streams: Callable[..., Streams],
) -> None:
    seen: list[set[int]] = [set(), set()]
    both = streams(*(lambda n=n: seen[n].add(threading.get_ident()) for n in range(2)))
    for _ in range(3):
        both.flow(0.001)
    assert seen[0] == {threading.get_ident()}
    assert len(seen[1]) == 1 and not seen[1] & seen[0]


def test_at_least_so_many_requests_of_every_stream_count(streams: Callable[..., Streams]) -> None:
    assert len(streams(lambda: None, lambda: None).flow(0, least=7).latencies_ms) >= 14


def test_nothing_counts_before_every_stream_has_led_in(streams: Callable[..., Streams]) -> None:
    steps = [0, 0]
    often = threading.Event()

    def slow_to_start() -> None:
        steps[0] += 1
        assert often.wait(WAIT_S)

    def quick() -> None:
        steps[1] += 1
        if steps[1] == 50:
            often.set()

    flow = streams(slow_to_start, quick).flow(0)
    assert 2 <= len(flow.latencies_ms) <= sum(steps) - 50


def test_every_stream_works_until_the_last_has_counted(streams: Callable[..., Streams]) -> None:
    done = threading.Event()
    steps = [0, 0]

    def quick() -> None:
        steps[0] += 1
        if steps[0] == 100:
            done.set()

    def slow() -> None:
        steps[1] += 1
        if steps[1] > 1:  # the first leads in
            assert done.wait(WAIT_S)

    streams(quick, slow).flow(0)
    assert steps[0] >= 100


@pytest.mark.parametrize("number", [0, 1])
def test_a_stream_that_fails_stops_the_others(streams: Callable[..., Streams], number: int) -> None:
    def broken() -> None:
        raise ValueError("not to my taste")

    steps = [lambda: None, lambda: None]
    steps[number] = broken
    with pytest.raises(ValueError, match="not to my taste"):
        streams(*steps).flow(3600)


def test_the_garbage_collector_is_as_it_was(streams: Callable[..., Streams]) -> None:
    seen: set[bool] = set()
    streams(lambda: seen.add(gc.isenabled())).flow(0)
    assert seen == {False}
    assert gc.isenabled()


def test_one_stream_is_a_flow_too(streams: Callable[..., Streams]) -> None:
    flow = streams(lambda: None).flow(0.001)
    assert isinstance(flow, Flow)
    assert flow.requests_per_second > 0
