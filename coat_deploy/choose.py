"""Choose a precision by measuring: of those that agree with eager, what runs best here.

every precision > candidate > bar > bench > the winner alone is committed
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from coat_deploy.artifact import Artifact
from coat_deploy.backends.select import usable_precisions
from coat_deploy.candidate import MakeBatches, Recipe
from coat_deploy.errors import (
    BackendMissing,
    BelowBar,
    CoatDeployError,
    CorruptArtifact,
    GraphError,
    RunnerError,
    UsageError,
)
from coat_deploy.export import (
    Exported,
    ExportOptions,
    Prepared,
    Progress,
    attempt,
    precisions,
    prepare,
    settle_recipe,
    written_spec,
)
from coat_deploy.images import normalise
from coat_deploy.machine import Machine, describe
from coat_deploy.measure.bar import get_bar
from coat_deploy.measure.bench import BenchOptions, Contender, bench
from coat_deploy.measure.choice import Choice, decide
from coat_deploy.measure.latency import Latency
from coat_deploy.measure.proof import probe_images
from coat_deploy.measure.validate import Validation
from coat_deploy.model import VERSION
from coat_deploy.open import load_unchecked
from coat_deploy.repository import Repository
from coat_deploy.runner import LoadOptions, Pixels
from coat_deploy.spec import ModelSpec, Preprocess, Size

_RULES_OUT = (BelowBar, RunnerError, BackendMissing, CorruptArtifact, GraphError, UsageError)
"""What rules one precision out; any other error would meet all of them."""

_Reasons = dict[str, CoatDeployError]


@dataclass(frozen=True)
class ChooseOptions:
    """How to choose.

    `budget_s`: seconds of measuring in all, starts apart; fewer when the medians stand still.
    `margin`: another than the most exact is taken when the 95 % interval of its ratio lies above.
    `batch`: images in the batch that is timed, at the nominal size.
    `limits`: limits that replace those of each precision's bar, by name.
    """

    budget_s: float = 10.0
    margin: float = 1.05
    batch: int = 1
    limits: Mapping[str, float] = field(default_factory=dict)


def choose(
    repository: Repository,
    name: str,
    options: ExportOptions,
    choosing: ChooseOptions | None = None,
    batches: MakeBatches | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Export the model `name` in the precision that runs best here above its bar.

    As `export.export` in all else; `options.precision` does not count. Every precision of the
    target is made aside and held against eager, and those that agree are timed side by side in
    processes of their own: a script calls this under `if __name__ == "__main__"`. What was
    compared is in the artifact's `choice`.
    Raises: UsageError without validation; the most exact precision's error when none passes;
    RunnerError when none can be timed; any other CoatDeployError. The model folder is then
    unchanged.
    """
    choosing, tell = choosing or ChooseOptions(), progress or (lambda step: None)
    if not options.validate:
        raise UsageError(
            "precision auto: cannot be chosen without validation, which tells what each "
            "precision costs. Name a precision, or let it be validated."
        )
    source = repository.find(name)
    spec = written_spec(source.spec, options)
    recipes, reasons = _settle_recipes(spec, options)
    with prepare(repository, source, spec, options, tell) as prepared:
        selection = _Selection(prepared, options, choosing, tell, reasons)
        selection.make(recipes, batches)
        choice = selection.choose(next(iter(recipes.values())).nominal)
        artifact, validation = selection.made[choice.chosen.precision]
        _withdraw_others(prepared, artifact)
        artifact = dataclasses.replace(artifact, choice=choice.to_json())
        return prepared.commit(artifact, validation)


def _settle_recipes(spec: ModelSpec, options: ExportOptions) -> tuple[dict[str, Recipe], _Reasons]:
    """Return a recipe a precision, and why others have none. Raises what all of them raise."""
    recipes: dict[str, Recipe] = {}
    reasons: _Reasons = {}
    for precision in _tried(options):
        own = dataclasses.replace(options, precision=precision)
        try:
            recipes[precision] = settle_recipe(spec, own)
        except (UsageError, GraphError) as error:
            reasons[precision] = error
    if not recipes:
        _raise_for_all(options, reasons)
    return recipes, reasons


def _tried(options: ExportOptions) -> tuple[str, ...]:
    """Return the precisions to choose from, the most exact first. Raises UsageError."""
    precisions(options.target)
    return usable_precisions(options.target, options.device)


def _raise_for_all(options: ExportOptions, reasons: _Reasons) -> None:
    """Raise the error of the most exact precision, with those of the others in its message."""
    target = options.target
    in_order = {precision: reasons[precision] for precision in _tried(options)}
    first = next(iter(in_order.values()))
    if len({str(error) for error in in_order.values()}) == 1:
        raise first
    each = " ".join(f"{precision}: {error}" for precision, error in in_order.items())
    raise type(first)(f"{target}: no precision can be exported. {each}") from first


@dataclass
class _Selection:
    """The precisions of a target on their way: those that pass, and why others do not."""

    prepared: Prepared
    options: ExportOptions
    choosing: ChooseOptions
    tell: Progress
    reasons: _Reasons
    made: dict[str, tuple[Artifact, Validation | None]] = field(default_factory=dict)

    def make(self, recipes: Mapping[str, Recipe], batches: MakeBatches | None) -> None:
        """Make each aside and hold it against its bar. Raises the errors of all if none passes."""
        for precision, recipe in recipes.items():
            bar = (self.options.bar or get_bar(precision)).override(**self.choosing.limits)
            own = dataclasses.replace(self.options, precision=precision, bar=bar)
            tell = functools.partial(self._tell_of, precision)
            try:
                self.made[precision] = attempt(self.prepared, recipe, own, batches, tell)
            except _RULES_OUT as error:
                self.reasons[precision] = error
        if not self.made:
            _raise_for_all(self.options, self.reasons)

    def choose(self, size: Size) -> Choice:
        """Time those that pass at `size` and decide. Raises RunnerError when none can be timed."""
        latencies, machine = self._measure(size)
        considered = decide(
            _tried(self.options),
            {precision: artifact.agreement for precision, (artifact, _) in self.made.items()},
            {precision: str(error) for precision, error in self.reasons.items()},
            latencies,
            self.choosing.margin,
        )
        how = self.choosing
        return Choice(considered, how.margin, how.batch, size, self.options.threads, machine)

    def _measure(self, size: Size) -> tuple[dict[str, Latency], Machine]:
        """Return the latency of each, where there is anything to compare; drop those that fail."""
        while len(self.made) > 1:
            contenders = [self._contender(artifact, size) for artifact, _ in self.made.values()]
            exact = contenders[0].name
            report = bench(
                contenders,
                functools.partial(_pixels, self.prepared.spec.preprocess),
                BenchOptions(budget_s=self.choosing.budget_s, baseline=exact),
                lambda what, done: self.tell(f"measuring {what} {done:.0%}"),
            )
            for failure in report.failures:
                self.reasons[failure.name] = RunnerError(f"cannot be timed: {failure.error}")
                del self.made[failure.name]
            if exact in self.made:  # else the others were divided by nothing
                return {latency.name: latency for latency in report.results}, report.machine
        return {}, describe()

    def _contender(self, artifact: Artifact, size: Size) -> Contender:
        path = self.prepared.staging.folder / VERSION / artifact.file
        load = LoadOptions(
            threads=self.options.threads,
            precision=artifact.precision,
            device=self.options.device,
        )
        return Contender(
            name=artifact.precision,
            target=artifact.target,
            precision=artifact.precision,
            form=artifact.form,
            batch=self.choosing.batch,
            size=size,
            threads=self.options.threads,
            load=functools.partial(load_unchecked, artifact.target, path, load),
            sha256=artifact.sha256,
        )

    def _tell_of(self, precision: str, step: str) -> None:
        self.tell(f"{precision}: {step}")


def _pixels(how: Preprocess, batch: int, size: Size) -> Pixels:
    """Return synthetic images: no kernel's time depends on what is in them."""
    return normalise(probe_images(size, batch), how.mean, how.std)


def _withdraw_others(prepared: Prepared, artifact: Artifact) -> None:
    """Leave of all artifacts' files aside only those of the one that was chosen."""
    for path in sorted((prepared.staging.folder / VERSION).iterdir()):
        if path.name not in artifact.files:
            prepared.staging.withdraw(f"{VERSION}/{path.name}")
