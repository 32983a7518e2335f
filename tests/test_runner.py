import pytest

from coat_deploy import runner
from coat_deploy.errors import UsageError
from coat_deploy.runner import LoadOptions


@pytest.fixture
def six_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "usable_threads", lambda: 6)


def test_streams_share_the_threads() -> None:
    options = LoadOptions(threads=8, streams=4)
    assert (options.total_threads, options.stream_threads) == (8, 2)


@pytest.mark.usefixtures("six_threads")
def test_streams_share_those_of_the_machine_where_no_number_is_given() -> None:
    options = LoadOptions(streams=3)
    assert (options.total_threads, options.stream_threads) == (6, 2)


def test_one_stream_leaves_the_threads_to_the_runtime() -> None:
    assert (LoadOptions().total_threads, LoadOptions().stream_threads) == (None, None)


@pytest.mark.usefixtures("six_threads")
@pytest.mark.parametrize(
    ("threads", "streams", "said"),
    [(2, 3, "got 3 streams and 2 threads"), (None, 7, "got 7 streams and 6 threads")],
)
def test_more_streams_than_threads_are_refused_with_both(
    threads: int | None, streams: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        LoadOptions(threads=threads, streams=streams)


def test_no_stream_is_refused() -> None:
    with pytest.raises(UsageError, match="got 0, expected 1 or more"):
        LoadOptions(streams=0)
