"""A candidate: an artifact in the making, which must prove itself before it is let in.

graph > file (> engine) > proof > replay > validation
network > package       > proof > replay > validation
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from onnx import ModelProto

from coat_deploy.artifact import artifact_name
from coat_deploy.backends.select import (
    ENGINES,
    PACKAGES,
    STAND_IN,
    engine_backend,
    for_gpu,
    package_backend,
    require,
)
from coat_deploy.digest import sha256_bytes
from coat_deploy.engine import BuildOptions, EngineRecord
from coat_deploy.errors import BelowBar
from coat_deploy.graph.check import check_graph
from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.emulation import emulate
from coat_deploy.graph.form import get_form
from coat_deploy.graph.metadata import add_metadata
from coat_deploy.graph.precision import Lowering, asked_of, lower
from coat_deploy.graph.read import read_graph
from coat_deploy.graph.serialise import serialise
from coat_deploy.images import normalise
from coat_deploy.measure.bar import Bar
from coat_deploy.measure.proof import Proof, make_proof, probe_images, replay
from coat_deploy.measure.validate import Batch, Validation, batch_sizes_in_turn, validate
from coat_deploy.model import VERSION, WEIGHTS, Staging
from coat_deploy.network.variants import get_variant
from coat_deploy.network.weights import fit, read_safetensors
from coat_deploy.package import PackageRecord
from coat_deploy.repository import read_labels
from coat_deploy.runner import LoadOptions, Runner
from coat_deploy.spec import ModelSpec, Preprocess, Size

SYNTHETIC_IMAGES = 8
SYNTHETIC_BATCHES = (1, 2, 5)
SYNTHETIC_SEED = 1

Files = dict[str, str]
"""Names of files with the digest of each; the one that a runtime opens first."""

MakeBatches = Callable[[Preprocess], Iterable[Batch]]


@dataclass(frozen=True)
class Recipe:
    """What to make, with every default settled; `size` None is dynamic H and W.

    `nominal` is the size it is proven at, which is `size` unless that is dynamic. `lowering`: what
    the graph's nodes compute in. `build`: how to build its engine, for targets that are engines.
    Of a package, which has no graph, `opset` is None.
    """

    target: str
    precision: str
    form: str
    size: Size | None
    nominal: Size
    features: bool
    opset: int | None
    lowering: Lowering = field(default_factory=lambda: Lowering("fp32"))
    build: BuildOptions | None = None


@dataclass(frozen=True)
class Written:
    """A graph, and its files with their digests, its own first."""

    files: Files
    graph: ModelProto


@dataclass(frozen=True)
class Candidate:
    """An artifact in a staging folder that holds the spec and the weights already.

    `device`: where it is proven, if its target runs on either.
    """

    staging: Staging
    spec: ModelSpec
    recipe: Recipe
    device: str = "cpu"

    @cached_property
    def name(self) -> str:
        """Name of the artifact."""
        r, default = self.recipe, self.spec.preprocess.input_size
        return artifact_name(r.target, r.precision, r.size, default, r.form, r.features)

    @cached_property
    def weights_sha256(self) -> str:
        """Digest of the weights it is made from."""
        return self.staging.weights_sha256()

    @property
    def proof_name(self) -> str:
        """Name of the proof's file."""
        return f"{self.name}.proof.npz"

    def write_graph(self) -> "Written":
        """Write the graph aside, and say what it is.

        Raises: WeightsError when the weights do not fit the spec; GraphError.
        """
        graph = self._graph()
        recipe = self.recipe
        choices = {"target": recipe.target, "precision": recipe.precision, "form": recipe.form}
        add_metadata(graph, self.spec, read_labels(self.spec), self.weights_sha256, **choices)
        check_graph(graph)
        files = serialise(graph, f"{self.name}.onnx")
        for file, content in files.items():
            self.staging.write(f"{VERSION}/{file}", content)
        return Written({file: sha256_bytes(c) for file, c in files.items()}, graph)

    def _graph(self) -> ModelProto:
        lowering, graph = self.recipe.lowering, self.float_graph()
        return graph if lowering.precision == "fp32" else lower(graph, lowering)

    def float_graph(self) -> ModelProto:
        """Return the graph before anything is lowered. Raises WeightsError, GraphError."""
        recipe, subject = self.recipe, str(self.staging.target.weights_path)
        tensors = read_safetensors(self.staging.folder / WEIGHTS)
        weights = fit(tensors, self.spec, subject=subject)
        assert recipe.opset is not None
        options = GraphOptions(recipe.size, recipe.features, recipe.opset)
        if recipe.form == "authored":
            form = get_form(recipe.target, recipe.precision)
            return author_graph(self.spec, weights, form, options)
        from coat_deploy.graph.traced import trace_graph

        return trace_graph(self.spec, weights, options)

    def build(self, written: "Written", tell: Callable[[str], None]) -> tuple[Files, EngineRecord]:
        """Build the engine of the graph aside; return its files, its own first, and what it is.

        Raises: GraphError, RunnerError, UsageError.
        """
        recipe, (graph, sha256) = self.recipe, next(iter(written.files.items()))
        assert recipe.build is not None
        place = self.staging.folder / VERSION / graph
        asked = asked_of(written.graph, recipe.lowering)
        built = engine_backend(recipe.target).build(place, recipe.build, asked, tell)
        made = {f"{self.name}.engine": built.plan, f"{self.name}.log": built.log.encode()}
        for file, content in made.items():
            self.staging.write(f"{VERSION}/{file}", content)
        (engine, log) = ({file: sha256_bytes(content)} for file, content in made.items())
        record = EngineRecord(
            flavour=recipe.target,
            version=built.version,
            gpu=built.gpu,
            compute_capability=built.compute_capability,
            graph_sha256=sha256,
            profiles=recipe.build.profiles,
            options=recipe.build.to_json() | recipe.lowering.to_json(),
            census=built.census.to_json(),
        )
        return {**engine, **written.files, **log}, record

    def compile(self) -> tuple[Files, PackageRecord]:
        """Compile the network aside; return the package's file, and what it is for.

        Raises: WeightsError, BackendMissing, DeviceMissing, RunnerError.
        """
        recipe = self.recipe
        assert recipe.size is not None
        how = LoadOptions(precision=recipe.precision, features=recipe.features, device=self.device)
        package = package_backend(recipe.target).build(self.staging.folder, recipe.size, how)
        file = f"{self.name}.pt2"
        self.staging.write(f"{VERSION}/{file}", package.content)
        return {file: sha256_bytes(package.content)}, package.record

    def load_reference(self, threads: int | None) -> Runner:
        """Load the eager network from the staging folder."""
        load = LoadOptions(threads=threads, features=self.recipe.features)
        return require("eager").load(self.staging.folder, load)

    def load(self, files: Files, threads: int | None) -> Runner:
        """Load it into the runtime it is made for.

        What nothing here can run is stood in for by its graph: `stand_in`.
        """
        if self.stand_in:
            return self.load_stand_in(next(f for f in files if f.endswith(".onnx")), threads)
        return self._load(
            self.recipe.target,
            next(iter(files)),
            LoadOptions(
                threads=threads,
                features=self.recipe.features,
                precision=self.recipe.precision,
                device=self.device,
            ),
        )

    def load_stand_in(self, graph: str, threads: int | None) -> Runner:
        """Load its graph on the CPU, where values of its low types are rounded, node by node.

        Raises: BackendMissing when the runtime for it is not installed.
        """
        if self.recipe.lowering.precision != "fp32":
            model = read_graph(self.staging.folder / VERSION / graph, weights=True)
            graph = "emulated.onnx"  # left aside: it is no file of the artifact
            for file, content in serialise(emulate(model), graph).items():
                (self.staging.folder / VERSION / file).write_bytes(content)
        load = LoadOptions(threads=threads, features=self.recipe.features, optimise=False)
        return self._load(STAND_IN, graph, load)

    def _load(self, target: str, file: str, load: LoadOptions) -> Runner:
        return require(target).load(self.staging.folder / VERSION / file, load)

    @cached_property
    def stand_in(self) -> str | None:
        """What computes its graph on the CPU instead, where it is for a GPU and none can run it.

        Raises: BackendMissing when its own target is not installed.
        """
        target = self.recipe.target
        if target in PACKAGES or not for_gpu(target, self.recipe.precision):
            return None
        at_hand = self.device == "cuda"
        if target in ENGINES:
            at_hand = engine_backend(target).unable() is None
        return None if at_hand else STAND_IN

    def prove(self, reference: Runner, candidate: Runner, sha256: str, bar: Bar) -> str:
        """Write its proof aside and replay it; return the proof's digest. Raises BelowBar."""
        how, size = self.spec.preprocess, self.recipe.nominal
        content = make_proof(reference, how, size, sha256, bar).to_bytes()
        self.staging.write(f"{VERSION}/{self.proof_name}", content)
        replay(Proof.from_bytes(content), candidate, f"{self.name} (not exported)")
        return sha256_bytes(content)

    def validate(
        self, reference: Runner, candidate: Runner, bar: Bar, batches: MakeBatches | None
    ) -> Validation:
        """Hold it against the eager network at every size of `sizes`. Raises BelowBar."""
        validation = self._validation(reference, candidate, bar, batches)
        if not validation.passed:
            raise BelowBar(
                f"{self.name}: not exported, it does not agree with eager: "
                f"{' '.join(validation.failures)}"
            )
        return validation

    def agrees(
        self, reference: Runner, candidate: Runner, bar: Bar, batches: MakeBatches | None
    ) -> bool:
        """Return whether it would pass `validate`."""
        return self._validation(reference, candidate, bar, batches).passed

    def _validation(
        self, reference: Runner, candidate: Runner, bar: Bar, batches: MakeBatches | None
    ) -> Validation:
        make = batches or synthetic_batches
        images = itertools.chain.from_iterable(
            make(self.spec.preprocess.at(size)) for size in self.sizes()
        )
        return validate(reference, candidate, images, bar)

    def sizes(self) -> Sequence[Size]:
        """Return the sizes it is validated at: two that differ in shape, if it takes them."""
        nominal = self.recipe.nominal
        if self.recipe.size is not None:
            return (nominal,)
        # A graph that only seems dynamic holds a constant of the nominal size.
        lower = max(nominal[0] * 3 // 4, get_variant(self.spec.architecture).min_side)
        return tuple(dict.fromkeys((nominal, (lower, nominal[1]))))


def synthetic_batches(how: Preprocess) -> Iterator[Batch]:
    """Yield synthetic images in batches of several sizes, for when there are no photographs."""
    pixels = normalise(
        probe_images(how.input_size, SYNTHETIC_IMAGES, SYNTHETIC_SEED), how.mean, how.std
    )
    for part in batch_sizes_in_turn(SYNTHETIC_IMAGES, SYNTHETIC_BATCHES):
        yield Batch(pixels[part.start : part.stop], tuple(f"synthetic {i}" for i in part))
