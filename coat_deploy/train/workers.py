"""What is prepared while the network is at work: by processes of its own, or by a thread."""

import contextlib
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from coat_deploy.train.order import Indices

PREFETCHED = 4
"""Results that each worker has ready."""

GRACE_S = 10.0
"""Seconds that a thread has to finish what it is reading, before it is left behind."""

Result = TypeVar("Result")


def in_workers(
    read: Callable[[Indices], Result], chosen: Sequence[Indices], workers: int
) -> Iterator[Result]:
    """Return what `read` makes of each of `chosen`, in that order, by so many processes.

    With 0 workers it is called as its results are asked for. Should `read` raise, the error
    arrives with a worker's traceback as its text: let it return what the user is to be told.
    Workers end when nothing refers to the iterator any more.
    """
    with warnings.catch_warnings():
        # More workers than cores may well wait for a disk together.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        # Python's word on forking beside PyTorch's threads, whose locks no worker takes.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        loader: DataLoader[Result] = DataLoader(
            _Items(read, len(chosen)),
            sampler=chosen,  # each is handed to `read`
            batch_size=None,  # an item is a whole batch
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=PREFETCHED if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals,
            # Its workers' seeds, of no use here, would be drawn from the default generator, and
            # by a training that is resumed within an epoch at another step.
            generator=torch.Generator(),
        )
        return iter(loader)


@dataclass(frozen=True)
class _Items(Dataset[Result], Generic[Result]):
    read: Callable[[Indices], Result]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Indices) -> Result:
        return self.read(indices)


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals(worker: int) -> None:
    """Let a worker live on when the whole group of processes is asked to end.

    The training has to save first. It ends its workers itself, by a second SIGTERM if need be.
    """

    def once(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), once)


def read_ahead(items: Iterator[Result], count: int) -> Generator[Result]:
    """Yield the items, up to `count` of them read ahead by a thread, which ends with this.

    What they raise is raised here.
    """
    ready: queue.Queue[Result | BaseException] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: Result | BaseException) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def read() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(StopIteration())
        except BaseException as error:
            put(error)

    reader = threading.Thread(target=read, daemon=True, name="read ahead")
    reader.start()
    try:
        while not isinstance(item := ready.get(), StopIteration):
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        reader.join(GRACE_S)
