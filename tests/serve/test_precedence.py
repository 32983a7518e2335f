"""The event loop goes before what computes, on Linux."""

import asyncio
import os
import sys
import threading

import pytest

from coat_deploy.serve.precedence import NICENESS, step_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="niceness by thread is Linux's")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


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

    assert in_a_thread(work) == (before + NICENESS,) * 2
    assert niceness() == before


def test_a_sandbox_that_forbids_it_is_no_error(monkeypatch):
    def forbidden(which, who, priority):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "setpriority", forbidden)
    assert in_a_thread(lambda: (step_back(), niceness())[1]) == niceness()


def test_models_are_loaded_and_computed_behind_the_event_loop(serving):
    before = set(threading.enumerate())
    service = serving(allow_load=True)
    asyncio.run(service.load("coat_toy"))  # by the threads that are there, or by such ones
    mine = [thread for thread in threading.enumerate() if thread not in before]
    kinds = {thread.name.rpartition("_")[0] or thread.name.partition(" ")[0] for thread in mine}
    assert kinds == {"loader", "worker"}
    ranks = {os.getpriority(os.PRIO_PROCESS, thread.native_id) for thread in mine}
    assert ranks == {niceness() + NICENESS}
