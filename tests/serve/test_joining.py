"""The transport that sends the head of an answer with its body."""

from coat_deploy.serve.connection import Joining

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"


class FakeTransport:
    def __init__(self):
        self.done = []

    def write(self, data):
        self.done.append(data)

    def close(self):
        self.done.append("closed")

    def is_closing(self):
        return "closed" in self.done


class FakeLoop:
    def __init__(self):
        self.soon = []

    def call_soon(self, function):
        self.soon.append(function)

    def turn(self):
        for function in self.soon:
            function()


def joined():
    transport, loop = FakeTransport(), FakeLoop()
    return Joining(transport, loop), transport.done, loop


def test_a_head_goes_with_its_body_in_one():
    joining, done, loop = joined()
    joining.write(HEAD)
    assert done == []
    joining.write(b"body")
    loop.turn()
    assert done == [HEAD + b"body"]


def test_a_body_that_comes_later_keeps_no_head_waiting():
    joining, done, loop = joined()
    joining.write(HEAD)
    loop.turn()
    joining.write(b"bo")
    joining.write(b"dy")
    assert done == [HEAD, b"bo", b"dy"]


def test_what_is_no_head_of_an_answer_goes_at_once():
    joining, done, _ = joined()
    joining.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    joining.write(HEAD)
    joining.write(b"HTTP/1.1 is what this body begins with")
    assert done[0].startswith(b"HTTP/1.1 100") and len(done) == 2


def test_a_head_is_sent_before_the_end():
    joining, done, loop = joined()
    joining.write(HEAD)
    joining.close()
    loop.turn()
    assert done == [HEAD, "closed"]


def test_it_is_closing_when_its_transport_is():
    joining, _, _ = joined()
    assert not joining.is_closing()
    joining.close()
    assert joining.is_closing()
