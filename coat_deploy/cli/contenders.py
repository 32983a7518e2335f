"""Who takes part in a bench: `--targets` read, what is missing exported, every proof replayed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from coat_deploy.artifact import NETWORK
from coat_deploy.cli import console
from coat_deploy.errors import (
    BackendMissing,
    CoatDeployError,
    DeviceMissing,
    PrecisionMissing,
    UsageError,
    unknown_name,
)
from coat_deploy.spec import Size

if TYPE_CHECKING:
    from coat_deploy.measure.bench import Contender
    from coat_deploy.measure.latency import Failure
    from coat_deploy.model import ArtifactQuery, Model
    from coat_deploy.open import Source
    from coat_deploy.repository import Repository
    from coat_deploy.runner import LoadOptions

COMPILE, EAGER = "compile", "eager"
FUSED = "fused"
EAGER_FORMS = (COMPILE, FUSED, f"{FUSED}+{COMPILE}")
"""How PyTorch may run the network: compiled, with kernels of ours for a GPU, or both."""
AUTHORED, TRACED = "authored", "traced"


@dataclass(frozen=True)
class Entry:
    """One of `--targets`: "openvino:bf16", "onnxruntime:traced", "eager:fp16:fused+compile".

    What is not said is the target's first precision and the authored form, never whatever
    artifact happens to be there.
    """

    text: str
    target: str
    precision: str
    form: str | None

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read an entry. Raises UsageError for a word that is neither precision nor form."""
        from coat_deploy.backends.select import EAGER_PRECISIONS, PACKAGES, PRECISIONS, TARGETS
        from coat_deploy.graph.form import FORM_NAMES

        target, *words = text.split(":")
        if target not in TARGETS:
            raise UsageError(unknown_name("target", target, TARGETS))
        graphs = () if target in PACKAGES else FORM_NAMES
        forms = EAGER_FORMS if target == EAGER else graphs
        precisions = EAGER_PRECISIONS if target == EAGER else PRECISIONS[target]
        precision = form = None
        for word in words:
            if word in precisions and precision is None:
                precision = word
            elif word in forms and form is None:
                form = word
            else:
                known = (*precisions, *forms)
                raise UsageError(unknown_name(f"precision or form of {target}", word, known))
        if form is None and target != EAGER and graphs:
            form = graphs[0]
        return cls(text, target, precision or precisions[0], form)

    @property
    def options(self) -> "LoadOptions":
        """How eager's network is run, with nothing else said.

        In a low precision, or fused, on the GPU: on a CPU neither is a way that anyone would take.
        """
        from coat_deploy.runner import LoadOptions

        if self.target != EAGER:
            return LoadOptions()
        words = (self.form or "").split("+")
        on_gpu = FUSED in words or self.precision != "fp32"
        return LoadOptions(
            precision=self.precision,
            compile=COMPILE in words,
            fused=FUSED in words,
            device="cuda" if on_gpu else "cpu",
        )

    def query(self, size: Size) -> "ArtifactQuery":
        """Return which artifact is meant."""
        from coat_deploy.model import ArtifactQuery

        precision = None if self.target == EAGER else self.precision  # weights have but one
        return ArtifactQuery(self.target, precision, size, self.form)

    def peer(self, entries: "Sequence[Entry]") -> str | None:
        """Return the traced one among `entries` that an authored one is held against.

        Of the same target and precision, or where there is none, of the target's first precision.
        """
        from coat_deploy.backends.select import PRECISIONS

        if self.form != AUTHORED:
            return None
        traced = {(e.target, e.precision): e.text for e in entries if e.form == TRACED}
        first = traced.get((self.target, PRECISIONS[self.target][0]))
        return traced.get((self.target, self.precision), first)


def read_entries(text: str) -> list[Entry]:
    """Return the entries of `--targets`. Raises UsageError for one that is named twice."""
    entries = [Entry.parse(part) for part in console.comma_separated(text, "targets")]
    names = [entry.text for entry in entries]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--targets: {twice[0]} is named twice. Name each once.")
    return entries


@dataclass
class LineUp:
    """The contenders: what to open for each, how it agreed just now, why one cannot start.

    `device` and `provider`: as of `LoadOptions`, for the targets that have the choice.
    `failed` and `left_out` map an entry to the reason: a failure, or nothing to worry about.
    """

    model: "Model"
    size: Size
    device: str = "cpu"
    provider: str | None = None
    sources: "dict[str, Source]" = field(default_factory=dict)
    agreements: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def load_options(self, entry: Entry, **others: Any) -> "LoadOptions":
        """Return how to load an entry, on its device."""
        from coat_deploy.backends.select import PROVIDED
        from coat_deploy.runner import DEVICES

        provider = self.provider if entry.target in PROVIDED else None
        device = max(self.device, entry.options.device, key=DEVICES.index)
        return replace(entry.options, device=device, provider=provider, **others)

    def device_of(self, entry: Entry) -> str:
        """Return where an entry runs: engines are for GPUs alone."""
        from coat_deploy.backends.select import ENGINES

        return "cuda" if entry.target in ENGINES else self.load_options(entry).device

    def contenders(
        self,
        entries: Sequence[Entry],
        batches: Sequence[int],
        threads: Sequence[int | None],
        streams: int = 1,
    ) -> "Iterator[Contender]":
        """Yield every entry that can start, at every batch size and number of threads."""
        from coat_deploy.measure.bench import Contender

        for entry, batch, count in _each(entries, batches, threads):
            source = self.sources.get(entry.text)
            if source is None:
                continue
            load = self.load_options(
                entry,
                threads=count,
                streams=streams,
                batch=batch,
                # What we are compared with is called as its users call it.
                whole_batches=entry.form == TRACED,
            )
            yield Contender(
                name=entry.text,
                target=entry.target,
                precision=source.precision,
                form=entry.form if entry.target == EAGER and entry.form else source.form,
                batch=batch,
                size=self.size,
                threads=count,
                device=self.device_of(entry),
                load=source.loader(load),
                file=source.path if source.artifact else source.model.weights_path,
                sha256=source.sha256,
                streams=streams,
                peer=entry.peer(entries),
            )

    def failures(
        self, entries: Sequence[Entry], batches: Sequence[int], threads: Sequence[int | None]
    ) -> "Iterator[Failure]":
        """Yield the measurements that cannot be made, because their entry cannot start."""
        from coat_deploy.measure.latency import Failure

        for entry, batch, count in _each(entries, batches, threads):
            if entry.text in self.failed:
                yield Failure(
                    name=entry.text,
                    target=entry.target,
                    precision=entry.precision or "fp32",
                    form=entry.form or NETWORK,
                    batch=batch,
                    size=self.size,
                    threads=count,
                    device=self.device_of(entry),
                    error=self.failed[entry.text],
                )


def _each(
    entries: Sequence[Entry], batches: Sequence[int], threads: Sequence[int | None]
) -> Iterator[tuple[Entry, int, int | None]]:
    yield from ((e, batch, count) for count in threads for batch in batches for e in entries)


def line_up(
    repository: "Repository",
    model: "Model",
    entries: Sequence[Entry],
    size: Size,
    weights: str | None,
    *,
    optional: bool = False,
    device: str = "cpu",
    provider: str | None = None,
) -> LineUp:
    """Export what is missing, and replay the proof of every artifact.

    An entry that cannot take part is noted, and the others go on; with `optional` one whose
    runtime or precision this machine lacks is left out, and has not failed.
    Raises: UsageError for what no other entry would mend, as weights that are nowhere.
    """
    if weights is not None and model.weights_path.exists():
        raise UsageError(
            f"--weights: {model.folder} has weights already. Leave it out, or put others there "
            f"with: coat-deploy export {model.name} --weights {weights}"
        )
    lineup = LineUp(model, size, device, provider)
    # Eager needs weights in a folder: an export puts them there, so artifacts come first.
    for entry in sorted(entries, key=lambda entry: entry.target == EAGER):
        try:
            _start(lineup, repository, entry, weights)
        except UsageError:
            raise
        except CoatDeployError as error:
            lacking = isinstance(error, BackendMissing | PrecisionMissing | DeviceMissing)
            reasons = lineup.left_out if optional and lacking else lineup.failed
            reasons[entry.text] = str(error)
    return lineup


def _start(lineup: LineUp, repository: "Repository", entry: Entry, weights: str | None) -> None:
    """Add what to open for an entry, after trying it."""
    from coat_deploy.backends.select import ON_GPUS, require, unusable
    from coat_deploy.open import check_machine, find_source, selftest

    require(entry.target)
    if lineup.device == "cuda" and entry.target not in ON_GPUS:
        raise DeviceMissing(f"{entry.target}: runs on the CPU alone. Leave it or --device out.")
    if reason := unusable(entry.target, entry.precision, lineup.device):
        raise DeviceMissing(f"{reason}.")
    if entry.target == EAGER:
        from coat_deploy.backends.eager import require_for

        require_for(lineup.load_options(entry))
    else:
        _export_missing(lineup, repository, entry, weights)
    source = find_source(lineup.model, entry.query(lineup.size))
    source = replace(source, network_precision=entry.precision)
    if source.artifact:
        source.model.check_parents(source.artifact)
        source.model.check_files(source.artifact)
        load = lineup.load_options(entry)
        check_machine(source.model, source.artifact, load.device)
        with source.loader(load)() as runner:
            agreement = selftest(source.model, source.artifact, runner)
        lineup.agreements[entry.text] = agreement.to_json()
    lineup.sources[entry.text] = source


def _export_missing(
    lineup: LineUp, repository: "Repository", entry: Entry, weights: str | None
) -> None:
    model, size = lineup.model, lineup.size
    if any(entry.query(size).matches(artifact) for artifact in model.artifacts):
        return
    from coat_deploy.backends.select import require

    require(EAGER)  # an export is held against it
    from coat_deploy.export import ExportOptions, export  # needs what running does not

    # A model that was given by its path is found by it again.
    name = model.name if model.folder.parent in repository.roots else str(model.folder)
    console.note(f"{entry.text}: not exported yet; exporting it.")
    options = ExportOptions(
        target=entry.target,
        precision=entry.precision,
        form=entry.form or "authored",
        size=None if size == model.spec.preprocess.input_size else size,
        device=lineup.device,
        weights=None if model.weights_path.exists() else weights,
    )
    lineup.model = export(repository, name, options).model
