"""Protocol buffers' text format, as far as Triton's config.pbtxt needs it."""

import json
from collections.abc import Iterator, Mapping, Sequence

Message = Mapping[str, object]
"""Fields by name: a text, a number, a Word, a message, or a list of these for a repeated field."""


class Word(str):
    """The name of an enum's value, which is written without quotes."""

    __slots__ = ()


def render(message: Message) -> str:
    """Return the text of a message, a field a line; a list of numbers stays on one line."""
    return "".join(f"{line}\n" for line in _fields(message))


def map_of(entries: Mapping[str, object]) -> list[Message]:
    """Return the field of a map, which in text is a list of keys and values."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def _fields(message: Message) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, list | tuple):
            yield from _repeated(name, value)
        else:
            yield from _field(name, value)


def _repeated(name: str, values: Sequence[object]) -> Iterator[str]:
    if any(isinstance(value, Mapping) for value in values):
        for value in values:
            yield from _field(name, value)
    elif values:
        yield f"{name}: [{', '.join(_scalar(value) for value in values)}]"


def _field(name: str, value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{name} {{"
        yield from (f"  {line}" for line in _fields(value))
        yield "}"
    else:
        yield f"{name}: {_scalar(value)}"


def _scalar(value: object) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    assert isinstance(value, str), value
    return json.dumps(value, ensure_ascii=False)
