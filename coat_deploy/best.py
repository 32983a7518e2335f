"""The fewest blocks that have to stay in float32 for a low precision to keep its bar.

fp16 throughout (but its islands) > below the bar? > bisect over the blocks > Lowering
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from coat_deploy.candidate import Candidate, MakeBatches
from coat_deploy.errors import BelowBar, GraphError
from coat_deploy.graph.precision import Lowering, modules
from coat_deploy.measure.bar import Bar
from coat_deploy.runner import Runner

BEST = "best"
BEST_OF = "fp16"
"""The precision of which `best` is a mixture with float32: the one with more fraction bits."""


def find_lowering(
    candidate: Candidate,
    reference: Runner,
    bar: Bar,
    batches: MakeBatches | None,
    threads: int | None,
    tell: Callable[[str], None],
) -> Lowering:
    """Return the candidate's lowering with the blocks that it must keep in float32.

    Graphs are tried on the CPU, whatever will run the engine. Graphs are left aside.
    Raises: BelowBar when not even all blocks in float32 keep the bar.
    """
    lowering = candidate.recipe.lowering
    blocks = modules(candidate.float_graph())

    def passes(keep: Sequence[str]) -> bool:
        tell(f"trying {lowering.precision} with {len(keep)} of {len(blocks)} blocks in fp32")
        trial = replace(
            candidate,
            recipe=replace(candidate.recipe, lowering=replace(lowering, keep=tuple(keep))),
        )
        try:
            files = trial.write_graph().files
        except GraphError:  # a weight that the low precision cannot hold
            return False
        with trial.load_stand_in(next(iter(files)), threads) as runner:
            return trial.agrees(reference, runner, bar, batches)

    kept = fewest(blocks, passes)
    if kept is None:
        raise BelowBar(
            f"{candidate.name}: not exported, not even with every block in fp32 does it agree "
            "with eager. Validate fp32 first, or ask for fewer --islands."
        )
    return replace(lowering, keep=kept)


def fewest(
    blocks: Sequence[str], passes: Callable[[Sequence[str]], bool]
) -> tuple[str, ...] | None:
    """Return blocks to keep of which none can be spared, in order; None if all are not enough.

    Supposes that more blocks kept are never worse. One that is needed is found by bisection: the
    first blocks, up to it, are enough together with those known to be needed, and without it they
    are not. So it takes about log2(n) trials for each.
    """
    needed: list[str] = []
    candidates = list(blocks)
    if passes(()):
        return ()
    if not passes(blocks):
        return None
    while not needed or not passes(_ordered(blocks, needed)):
        low, high = 0, len(candidates)  # so many are too few, and enough
        while high - low > 1:
            middle = (low + high) // 2
            if passes(_ordered(blocks, [*needed, *candidates[:middle]])):
                high = middle
            else:
                low = middle
        needed.append(candidates[high - 1])
        candidates = candidates[: high - 1]
    return tuple(_ordered(blocks, needed))


def _ordered(blocks: Sequence[str], some: Sequence[str]) -> list[str]:
    return [block for block in blocks if block in some]
