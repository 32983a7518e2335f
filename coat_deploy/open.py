"""Open a model for use: find its artifact, refuse what is stale or broken, replay its proof."""

import contextlib
import functools
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from coat_deploy.artifact import NETWORK, Artifact
from coat_deploy.backends.select import (
    CHOSEN,
    ENGINES,
    PACKAGES,
    PRECISIONS,
    TARGETS,
    check_provider,
    engine_backend,
    for_gpu,
    package_backend,
    require,
    unusable,
)
from coat_deploy.cache import compiled_folder, forget, holds_kept
from coat_deploy.digest import sha256_file
from coat_deploy.errors import (
    BelowBar,
    CorruptArtifact,
    RepositoryError,
    RunnerError,
    StaleArtifact,
    UsageError,
    unknown_name,
)
from coat_deploy.measure.agreement import Agreement
from coat_deploy.measure.proof import MAX_BYTES, Proof, replay
from coat_deploy.model import WEIGHTS, ArtifactQuery, Model
from coat_deploy.runner import LoadOptions, Runner
from coat_deploy.spec import Size

_log = logging.getLogger(__name__)

EAGER = "eager"


@dataclass(frozen=True)
class Source:
    """What a backend opens for a target of a model: an artifact, or for eager the folder."""

    model: Model
    target: str
    artifact: Artifact | None
    network_precision: str = "fp32"
    """What PyTorch computes in, for eager."""

    @property
    def path(self) -> Path:
        """The file, or for eager the model's folder."""
        return self.model.path(self.artifact) if self.artifact else self.model.folder

    @property
    def precision(self) -> str:
        """What the target computes in."""
        return self.artifact.precision if self.artifact else self.network_precision

    @property
    def form(self) -> str:
        """How the graph was written; the network itself for eager."""
        return self.artifact.form if self.artifact else NETWORK

    @property
    def sha256(self) -> str:
        """Digest of the artifact; of the weights for eager."""
        return self.artifact.sha256 if self.artifact else sha256_file(self.model.weights_path)

    @property
    def size(self) -> Size:
        """The image size it takes; the model's own where it takes any."""
        fixed = self.artifact.size if self.artifact else None
        return fixed or self.model.spec.preprocess.input_size

    def options(self, options: LoadOptions) -> LoadOptions:
        """Return `options` with the precision that the artifact was made for."""
        return replace(options, precision=self.precision)

    def loader(self, options: LoadOptions) -> Callable[[], Runner]:
        """Return a picklable function that loads it, without any check, in any process.

        What a runtime compiles is not kept, unless `options` say where: every load is a whole one.
        """
        return functools.partial(load_unchecked, self.target, self.path, self.options(options))


def default_target(model: Model, precision: str | None = None) -> str:
    """Return the first target that the model has logits for and that can run here, or eager.

    Never one that runs with PyTorch alone: it is used where it is named.
    With a `precision`, the first that it has logits in this precision for.
    """
    exported = {
        artifact.target
        for artifact in model.artifacts
        if not artifact.features and precision in (None, artifact.precision)
    }
    targets = [target for target in CHOSEN if target in exported]
    usable = [target for target in targets if unusable(target) is None]
    # An artifact whose runtime or GPU is not there is still the one that was meant.
    return next(iter([*usable, *targets]), EAGER)


def find_source(model: Model, query: ArtifactQuery) -> Source:
    """Return what to open for `query`, without opening it.

    Raises: UsageError for an unknown target, or a precision it does not compute in;
    RepositoryError for what is not there.
    """
    if query.target not in TARGETS:
        raise UsageError(unknown_name("target", query.target, TARGETS))
    known = PRECISIONS[query.target]
    if query.precision is not None and query.precision not in known:
        raise UsageError(unknown_name(f"precision for {query.target}", query.precision, known))
    if query.target != EAGER:
        return Source(model, query.target, model.find(query))
    if not model.weights_path.is_file():
        words = ["--models", str(model.written_to or model.folder.parent)]
        words += [] if model.spec.weights else ["--weights", "SOURCE"]
        raise RepositoryError(
            f"{model.folder}: no weights (expected {WEIGHTS} there). An export puts them there: "
            f"{shlex.join(['coat-deploy', 'export', model.name, *words])}"
        )
    return Source(model, EAGER, None)


def load_unchecked(target: str, path: Path, options: LoadOptions) -> Runner:
    """Load a file into a target's runtime.

    Raises: BackendMissing with the command to run; UsageError for a provider it does not have.
    """
    check_provider(target, options.provider)
    return require(target).load(path, options)


def open_source(source: Source, options: LoadOptions) -> Runner:
    """Load a source for work: parents and bytes as exported, and the proof replayed.

    What its runtime compiles is kept in the user's cache folder for the next time, and is trusted
    no more than the file: the proof is replayed on it, too.
    Raises: StaleArtifact, CorruptArtifact, BelowBar; the eager network has nothing to check.
    """
    if source.artifact is None:
        return source.loader(options)()
    source.model.check_parents(source.artifact)
    source.model.check_files(source.artifact)
    check_machine(source.model, source.artifact, options.device)
    kept = options.cache or compiled_folder(source.target, source.artifact.files)
    known = kept is not None and holds_kept(kept)
    options = replace(options, cache=kept)
    try:
        return _open_proven(source, source.artifact, options)
    except (BelowBar, RunnerError) as error:
        if kept is None or not known:
            raise
        _log.info("%s; once more, without what was kept in %s", error, kept)
        forget(kept)
        return _open_proven(source, source.artifact, options)


def check_machine(model: Model, artifact: Artifact, device: str) -> None:
    """Raise StaleArtifact for what was built or compiled for another machine than this.

    For an engine of another library, version or GPU; a package of another version of PyTorch,
    another kind of processor or GPU, or another device than the `device` it shall run on.
    """
    if artifact.target in ENGINES:
        _check_engine(model, artifact)
    elif artifact.target in PACKAGES:
        _check_package(model, artifact, device)


def _check_package(model: Model, artifact: Artifact, device: str) -> None:
    package = artifact.package
    if package is None:
        raise CorruptArtifact(
            f"{model.path(artifact)}: the manifest does not say what this package is for. "
            f"Run: {model.export_command(artifact)}"
        )
    reason = package_backend(artifact.target).mismatch(package, device)
    if reason is None:
        return
    if for_gpu(artifact.target, artifact.precision):
        device = "cuda"  # the only one it can be compiled for
    again = replace(artifact, package=replace(package, device=device))
    raise StaleArtifact(
        f"{model.path(artifact)}: not a package for this machine: {reason}. "
        f"Compile it here: {model.export_command(again)}"
    )


def _check_engine(model: Model, artifact: Artifact) -> None:
    if artifact.engine is None:
        raise CorruptArtifact(
            f"{model.path(artifact)}: the manifest does not say what this engine is for. "
            f"Run: {model.export_command(artifact)}"
        )
    reason = engine_backend(artifact.target).mismatch(artifact.engine)
    if reason:
        raise StaleArtifact(
            f"{model.path(artifact)}: not an engine for this machine: {reason}. "
            f"Build it here: {model.export_command(artifact)}"
        )


def _open_proven(source: Source, artifact: Artifact, options: LoadOptions) -> Runner:
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(source.loader(options)())
        agreement = selftest(source.model, artifact, runner)
        _log.info("%s: reproduces its proof (%s)", artifact.name, agreement.summary())
        stack.pop_all()  # it is the caller's now
    return runner


def selftest(model: Model, artifact: Artifact, runner: Runner) -> Agreement:
    """Replay an artifact's proof on `runner`, on this machine.

    Raises: BelowBar with the figures, CorruptArtifact for a proof that is damaged or another's.
    """
    path = model.proof_path(artifact)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CorruptArtifact(
            f"{path}: cannot be read ({error.strerror}). Run: {model.export_command(artifact)}"
        ) from error
    proof = Proof.from_bytes(content, str(path))
    proof.matches(artifact.sha256, artifact.name)
    return replay(proof, runner, artifact.name)
