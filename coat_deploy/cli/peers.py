"""Who takes part in `bench --peers`: every way to run a CoaT on this machine, and ours."""

from collections.abc import Mapping

from coat_deploy.cli import console
from coat_deploy.cli.contenders import COMPILE, EAGER, TRACED, Entry

BATCHES = "1,8"
BASELINE = f"onnxruntime:{TRACED}"
"""What most people would deploy: PyTorch's own export on the runtime it is made for."""


def peer_entries() -> list[Entry]:
    """Return PyTorch, PyTorch compiled, traced graphs and ours, by every target and precision.

    Packages of PyTorch's are contenders only where they are named: to compile one took 47 s for
    coat_lite_tiny and 172 s for coat_tiny on two cores, where 20 s measure all contenders of a
    batch size, and `eager:compile` stands for the same compiler.
    """
    from coat_deploy.backends.select import PRECISIONS, TARGETS
    from coat_deploy.graph.form import FORMS, TRACED_PRECISIONS

    ours = [
        (target if precision == PRECISIONS[target][0] else f"{target}:{precision}", precision)
        for target in TARGETS
        if target in FORMS
        for precision in PRECISIONS[target]
    ]
    traced = [f"{name}:{TRACED}" for name, precision in ours if precision in TRACED_PRECISIONS]
    names = (EAGER, f"{EAGER}:{COMPILE}", *traced, *(name for name, _ in ours))
    return [Entry.parse(name) for name in names]


def tell_left_out(left_out: Mapping[str, str]) -> None:
    """Tell which peers this machine lacks, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.note(f"left out: {', '.join(names)}: {reason}")
