"""The models that are served, by name: loaded, replaced by new versions, unloaded.

What is served changes in the event loop's thread alone, between two of its steps: a request that
has looked a model up is in that model's queue before anything else can happen, and a model is freed
only when its queue is empty. So no request is lost when a model is replaced.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from coat_deploy.backends.select import check_served
from coat_deploy.errors import CoatDeployError, RepositoryError, RequestError, UsageError
from coat_deploy.machine import usable_threads
from coat_deploy.model import CONFIG, MANIFEST, Model
from coat_deploy.repository import Repository
from coat_deploy.serve.batcher import Batcher
from coat_deploy.serve.options import ServeOptions
from coat_deploy.serve.precedence import step_back
from coat_deploy.serve.served import Served, can_serve, find_served, serve_model
from coat_deploy.serve.statistics import Listener

_log = logging.getLogger(__name__)

TRIES = 3
"""How often a changed folder is tried before it has to change again: it may be half written."""

Loaded = TypeVar("Loaded")
State = Literal["LOADING", "READY", "UNLOADING", "UNAVAILABLE"]
Tell = Callable[[str], None]
Signature = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True)
class IndexEntry:
    """A line of the repository's index."""

    name: str
    version: str
    state: State
    reason: str = ""


@dataclass
class _Slot:
    """A name, and what is served under it. `tried` counts attempts on the folder as it is."""

    model: Model
    served: Served | None = None
    reason: str = ""
    signature: Signature = ()
    tried: int = 0
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Registry:
    """Models by name."""

    def __init__(
        self, options: ServeOptions, batcher: Batcher, listeners: Sequence[Listener] = ()
    ) -> None:
        self._options, self._batcher, self._listeners = options, batcher, tuple(listeners)
        self._repository = Repository.open(options.models)
        self._slots: dict[str, _Slot] = {}
        # A runtime's own threads are started as a model is loaded, and take after who loads it.
        self._loaders = ThreadPoolExecutor(usable_threads(), "loader", initializer=step_back)

    def load_all(self, tell: Tell) -> None:
        """Load every model that is asked for, several at once; before the event loop runs.

        Raises: what the first that fails raises; nothing is served then.
        """
        submit = self._loaders.submit
        loads = [(m, _signature(m), submit(self._load, m)) for m in self._wanted()]
        for model, signature, load in loads:
            served = load.result()
            self._slots[model.name] = _Slot(model, signature=signature)
            self._serve(self._slots[model.name], served)
            tell(f"{served.name}: {served.source.path.name} is ready")

    def close(self) -> None:
        """Load no more; wait for what is being loaded."""
        self._loaders.shutdown(cancel_futures=True)

    async def _loaded(self, load: Callable[..., Loaded], *arguments: object) -> Loaded:
        return await asyncio.get_running_loop().run_in_executor(self._loaders, load, *arguments)

    def _wanted(self) -> list[Model]:
        check_served(self._options.target)
        if self._options.names:
            models = [self._repository.find(name) for name in self._options.names]
            for model in models:
                if sum(other.name == model.name for other in models) > 1:
                    raise UsageError(f"model {model.name}: is named twice. Name it once.")
            return models
        models = [m for m in self._repository.models() if can_serve(m, self._options)]
        if not models:
            place = self._repository.writable
            raise RepositoryError(
                f"{place}: no model there has an artifact that could be served. "
                f"Run: coat-deploy export coat_lite_tiny --models {place}"
            )
        return models

    def _load(self, model: Model) -> Served:
        return serve_model(model, self._options, self._listeners)

    def _serve(self, slot: _Slot, served: Served) -> None:
        """Put a model in the place of what was there."""
        before = slot.served
        self._batcher.add(served.lane)
        slot.model, slot.served, slot.reason = served.model, served, ""
        if before:
            self._batcher.retire(before.lane)

    def get(self, name: str, version: str | None = None) -> Served:
        """Return what is served as `name`. Raises RequestError for what is not."""
        slot = self._slots.get(name)
        if slot is None:
            known = ", ".join(sorted(self._slots)) or "none"
            raise RequestError(
                f"model '{name:.100}': is not served (served: {known}).", "not_found"
            )
        if slot.served is None:
            reason = slot.reason or "is being loaded"
            raise RequestError(f"model {name}: is not ready ({reason}).", "unavailable")
        if version not in (None, "", slot.served.version):
            raise RequestError(
                f"model {name}: has no version '{version:.20}' (expected {slot.served.version}).",
                "not_found",
            )
        return slot.served

    def served(self) -> list[Served]:
        """Return what is served, by name."""
        return [slot.served for _, slot in sorted(self._slots.items()) if slot.served]

    @property
    def ready(self) -> bool:
        """Whether every model that was loaded and not unloaded is served."""
        return all(slot.served or slot.reason for slot in self._slots.values())

    async def index(self) -> list[IndexEntry]:
        """Return all models of the repository that could be served, and what is served."""
        catalogue = await asyncio.to_thread(self._catalogue)
        names = sorted({*catalogue, *self._slots})
        return [self._entry(name, self._slots.get(name)) for name in names]

    def _entry(self, name: str, slot: _Slot | None) -> IndexEntry:
        if slot and slot.served:
            return IndexEntry(name, slot.served.version, "READY")
        if slot and not slot.reason:
            return IndexEntry(name, "", "LOADING")
        return IndexEntry(name, "", "UNAVAILABLE", slot.reason if slot else "not loaded")

    def _catalogue(self) -> dict[str, Model]:
        return {m.name: m for m in self._repository.models() if can_serve(m, self._options)}

    async def load(self, name: str) -> None:
        """Load a model of the repository, or load it again.

        The name is looked up among those that are there; it never becomes a path.
        Raises: RequestError when it is not there, or is refused; what was served stays.
        """
        self._check_allowed()
        slot = self._slots.get(name)
        if slot is None:
            catalogue = await asyncio.to_thread(self._catalogue)
            if name not in catalogue:
                raise RequestError(f"model '{name:.100}': is not in the repository.", "not_found")
            slot = self._slots.setdefault(name, _Slot(catalogue[name], reason="not loaded"))
        async with slot.changing:
            model, signature = Model(slot.model.folder), _signature(slot.model)
            try:
                served = await self._loaded(self._load, model)
            except CoatDeployError as error:
                slot.reason = str(error)
                raise RequestError(str(error)) from error
            slot.signature, slot.tried = signature, 0
            self._serve(slot, served)
            _log.info("%s: %s is served", name, served.source.path.name)

    async def unload(self, name: str) -> None:
        """Stop serving a model; what waits for it is computed. Raises RequestError."""
        self._check_allowed()
        served = self.get(name)
        slot = self._slots[name]
        async with slot.changing:
            slot.served, slot.reason = None, "unloaded"
            self._batcher.retire(served.lane)
            _log.info("%s: is no longer served", name)

    def _check_allowed(self) -> None:
        if not self._options.allow_load:
            raise RequestError(
                "models: clients may not load or unload them here (--allow-load lets them).",
                "forbidden",
            )

    async def refresh(self) -> None:
        """Replace models whose folders have changed; one that is broken leaves the old serving."""
        for name, slot in list(self._slots.items()):
            if slot.served is None or slot.changing.locked():
                continue
            signature = await asyncio.to_thread(_signature, slot.model)
            if signature != slot.signature:
                slot.signature, slot.tried = signature, 0
            elif slot.tried == 0 or slot.tried >= TRIES:
                continue
            async with slot.changing:
                await self._replace(name, slot)

    async def _replace(self, name: str, slot: _Slot) -> None:
        slot.tried += 1
        before, model = slot.served, Model(slot.model.folder)
        if before is None:
            return
        try:
            served = await self._loaded(self._load_if_new, model, before)
        except CoatDeployError as error:
            if slot.tried == TRIES:
                _log.warning("%s: changed, and is served as it was before: %s", name, error)
            return
        slot.tried = 0
        if served:
            self._serve(slot, served)
            _log.info("%s: a new %s is served", name, served.source.path.name)

    def _load_if_new(self, model: Model, before: Served) -> Served | None:
        if before.same_as(find_served(model, self._options)):
            return None
        return self._load(model)


def _signature(model: Model) -> Signature:
    """Return what tells that a model's folder has changed: every export replaces its manifest."""
    return tuple(_stamp(os.path.join(model.folder, name)) for name in (CONFIG, MANIFEST))


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)
