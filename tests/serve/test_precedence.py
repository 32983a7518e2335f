"""The event loop goes before what computes."""

import asyncio
import os
import sys
import threading

from coat_deploy.serve.precedence import NICENESS, step_back

STEP = NICENESS if sys.platform == "linux" else 0  # elsewhere niceness is a whole process's


def niceness() -> int:
    return os.nice(0)


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_steps_back_with_all_that_it_starts_and_alone():
    before = niceness()

    def work():
        step_back()
        return niceness(), in_a_thread(niceness)

    assert in_a_thread(work) == (before + STEP,) * 2
    assert niceness() == before


def test_a_sandbox_that_forbids_it_is_no_error(monkeypatch):
    def forbidden(more):
        raise PermissionError("not here")

    with monkeypatch.context() as patch:
        patch.setattr(os, "nice", forbidden)
        assert in_a_thread(lambda: (step_back(), "goes on")[1]) == "goes on"


def test_elsewhere_the_whole_process_is_left_alone(monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "nice", asked.append)
        patch.setattr(sys, "platform", "darwin")
        in_a_thread(step_back)
    assert asked == []


def test_models_are_loaded_and_computed_behind_the_event_loop(serving, monkeypatch):
    """By every thread that the service starts, and by no other."""
    before, stepped = set(threading.enumerate()), set()

    def note():
        stepped.add(threading.current_thread())

    for user in ("batcher", "registry"):
        monkeypatch.setattr(f"coat_deploy.serve.{user}.step_back", note)
    service = serving(allow_load=True)
    asyncio.run(service.load("coat_toy"))
    assert {thread.name.partition("_")[0][:6] for thread in stepped} == {"loader", "worker"}
    assert stepped == set(threading.enumerate()) - before
