"""What an engine's layers compute in, counted, and held against what was asked for."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coat_deploy.errors import GraphError


@dataclass(frozen=True)
class EngineLayer:
    """A layer as a runtime reports it.

    `kind`: what the runtime calls its operation. `node`: the graph's node that it is of, whose
    name is the path of a module. `precision`: of what it puts out.
    """

    name: str
    kind: str
    node: str
    precision: str


@dataclass(frozen=True)
class Asked:
    """What the nodes of a graph shall compute in.

    `precisions` by the nodes' names. `needed`: nodes that some layer must be of; were a runtime's
    layers not to be told by their nodes, nothing would be checked.
    """

    precisions: Mapping[str, str]
    needed: tuple[str, ...]


@dataclass(frozen=True)
class Census:
    """All layers of an engine that compute with floating-point numbers."""

    layers: tuple[EngineLayer, ...]

    def check(self, asked: Asked, subject: str) -> None:
        """Raise GraphError naming the layers that do not compute as asked of their nodes."""
        precisions = asked.precisions
        wrong = [
            f"{layer.name} ({layer.kind.lower()}) in {layer.precision}, not "
            f"{precisions[layer.node]}"
            for layer in self.layers
            if layer.precision != precisions.get(layer.node, layer.precision)
        ]
        if wrong:
            raise GraphError(
                f"{subject}: {len(wrong)} of {len(self.layers)} layers do not compute as asked: "
                f"{_first(wrong)}. The graph's types are not those of its precision; export again."
            )
        found = {layer.node for layer in self.layers}
        lost = [node for node in asked.needed if node not in found]
        if lost:
            raise GraphError(
                f"{subject}: no layer is known to be of {len(lost)} nodes: {_first(lost)}. "
                "What they compute in cannot be proven with this version."
            )

    def to_json(self) -> dict[str, Any]:
        """Return `layers`, and the layers and their share by precision, by kind and by stage."""
        return {
            "layers": len(self.layers),
            "by_precision": self._shares(layer.precision for layer in self.layers),
            "by_kind": _nested((layer.kind.lower(), layer.precision) for layer in self.layers),
            "by_stage": _nested((stage(layer.node), layer.precision) for layer in self.layers),
        }

    def _shares(self, values: Iterable[str]) -> dict[str, dict[str, float]]:
        counts = Counter(values)
        return {
            value: {"layers": count, "share": round(count / len(self.layers), 4)}
            for value, count in sorted(counts.items())
        }


def stage(node: str) -> str:
    """Return the first part of a module's path: "serial_blocks1", "patch_embed2", "head"."""
    return node.split(".", 1)[0]


def _nested(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    counts = Counter(pairs)
    found: dict[str, dict[str, int]] = {}
    for (outer, inner), count in sorted(counts.items()):
        found.setdefault(outer, {})[inner] = count
    return found


def _first(names: Sequence[str], most: int = 3) -> str:
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
