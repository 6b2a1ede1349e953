"""The LoRAs that requests may name: found in a directory, read when first used, and kept in memory
as far as it goes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from stepweave.adapters.lora_directory import LoraDirectory, LoraFile, digest
from stepweave.adapters.lora_files import Lora, check_takes_loras, read_lora
from stepweave.compat.row_adapters import Chosen, pairs_of
from stepweave.errors import (
    LoadError,
    LoraError,
    LoraNotFoundError,
    UnavailableError,
    did_you_mean,
    shown,
)
from stepweave.jobs.job import inside_any_engine
from stepweave.loading.reading import listed
from stepweave.parameters import MOST_LORA_SCALE, MOST_LORAS
from stepweave.threads import DaemonExecutor

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30
RETRY_SECONDS = 10  # after a file could not be read
# seconds for which adapters in memory stay in use while a job waits for their memory; then other
# jobs that name them wait as well, so that it is freed
_PATIENCE = 10.0
_numbers = itertools.count(1)  # of all in the process, since layers know adapters by these


@dataclass(frozen=True)
class LoraStats:
    """What has happened since the start. `seconds` of reading, in all."""

    loaded: int
    bytes: int
    loads: int
    evictions: int
    failures: int
    seconds: float


class Loras:
    """LoRAs for the modules of one pipeline, by name. For any thread.

    Args:
        pipeline: a diffusers pipeline that takes LoRAs; LoadError is raised for another, and for
            one with compiled modules.
        directory: each safetensors file in it, and each folder with one, is an adapter.
        files: others, by name.
        looks: whether the directory is read again whenever a name is looked up. If not, `look` does
            so, and adapters are read and loaded from what there is then.
        max_bytes: of the adapters in memory, in use or not; one that is being read comes on top.
            The one that was not used for longest leaves, but none that a job uses.
        device: where adapters are kept; the pipeline's by default.
        twins: modules with the same layers, by the component's name.

    >>> loras = Loras(pipeline, "loras")
    >>> with StepEngine(pipeline, loras=loras) as engine:
    ...     job = engine.submit(prompt=prompt, lora=[("rings", 0.8)])
    """

    def __init__(
        self,
        pipeline: Any,
        directory: str | Path | None = None,
        *,
        files: Mapping[str, Path] | None = None,
        max_bytes: int = MAX_BYTES,
        device: torch.device | None = None,
        twins: Mapping[str, Sequence[nn.Module]] | None = None,
        looks: bool = True,
    ) -> None:
        check_takes_loras(pipeline)
        self._pipeline = pipeline
        self._files = LoraDirectory(None if directory is None else Path(directory), files or {})
        self._looks = looks
        self._max_bytes = max_bytes
        own = getattr(pipeline, "_execution_device", "cpu")
        self._device = torch.device(own) if device is None else device
        self._twins = dict(twins or {})
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the least recently used first
        self._removed: set[str] = set()
        self._failed: dict[str, tuple[LoraFile, str]] = {}
        self._numbers: dict[tuple[str, bytes], int] = {}
        self._living: WeakValueDictionary[int, Lora] = WeakValueDictionary()  # by their numbers
        self._leaving: list[_Kept] = []  # removed or replaced, but still in use
        self._loads = self._evictions = self._failures = 0
        self._seconds = 0.0
        self._reading = threading.Lock()  # one at a time
        self.reader = DaemonExecutor(1, "stepweave-lora")
        self.looker = DaemonExecutor(1, "stepweave-lora-look")  # may hang, as the directory does
        self._looked = -math.inf  # when the last look began
        self._changed = threading.Condition()
        self._waiting: float | None = None  # since when one waits for memory

    def names(self) -> list[str]:
        """The names of all adapters, sorted, whether they are in memory or not."""
        return sorted(self._found())

    def check(self, lora: Iterable[tuple[str, float]]) -> None:
        """Raise what `choose` does for names and scales."""
        found = self._found()
        for name, _ in _checked(lora):
            _file_of(name, found)

    def choose(
        self, lora: Iterable[tuple[str, float]], given_up: Callable[[], bool] = lambda: False
    ) -> Chosen:
        """Adapters with their scales. Those that are not in memory are read first, which takes
        seconds, and waits for memory while jobs use all of it, until it is `given_up`.

        Raises LoraNotFoundError; LoraError for one that cannot be used, for more than fit into
        memory at once, and for other scales than -10 to 10.
        """
        wanted = _checked(lora)
        ready = self.ready(wanted)
        if ready is not None:
            return ready
        with self._one_at_a_time():
            pinned: dict[Lora, Chosen] = {}  # so that none leaves for another of them
            try:
                adapters = [(self._read(name, pinned, given_up), scale) for name, scale in wanted]
                return self._in_use(adapters)
            finally:
                pinned.clear()  # also if an error's traceback holds this frame

    def choose_later(
        self, lora: Sequence[tuple[str, float]], given_up: Callable[[], bool] = lambda: False
    ) -> Future[Chosen]:
        """The same, read on a thread of its own. Raises at once what is known without reading."""
        ready = self.ready(lora)
        if ready is None:
            return self.reader.submit(self.choose, lora, given_up)
        future: Future[Chosen] = Future()
        future.set_result(ready)
        return future

    def ready(self, lora: Iterable[tuple[str, float]]) -> Chosen | None:
        """The same, at once; None if one of them is not in memory, or if another job has waited
        long for memory."""
        wanted = _checked(lora)
        found = self._found()
        files = {name: _file_of(name, found) for name, _ in wanted}
        with self._changed:
            for name, file in files.items():
                if self._at_hand(name, file) is None:
                    self._check_usable(name, file)
            if self._waiting is not None and time.monotonic() - self._waiting > _PATIENCE:
                return None
            adapters = []
            for name, scale in wanted:
                adapter = self._at_hand(name, files[name])
                if adapter is None:
                    return None
                self._kept.move_to_end(name)
                adapters.append((adapter, scale))
            return self._in_use(adapters)

    def load(self, name: str, given_up: Callable[[], bool] = lambda: False) -> Lora:
        """Have an adapter in memory, also one that was removed. Raises as `choose`."""
        with self._one_at_a_time():
            with self._changed:
                removed = name in self._removed
                self._removed.discard(name)
            pinned: dict[Lora, Chosen] = {}
            try:
                adapter = self._read(name, pinned, given_up)
                _file_of(name, self._offered())  # it may have been removed meanwhile
                return adapter
            except BaseException:
                if removed:
                    with self._changed:
                        self._removed.add(name)
                raise
            finally:
                pinned.clear()

    def remove(self, name: str) -> None:
        """Let go of an adapter, and know its name no more, until it is loaded again. Jobs that have
        it keep it. Raises LoraNotFoundError."""
        _file_of(name, self._found())
        with self._changed:
            self._removed.add(name)
            self._let_go(name)
            self._changed.notify_all()

    def loaded(self) -> dict[str, Lora]:
        """The adapters in memory, by name."""
        with self._changed:
            return {name: kept.adapter for name, kept in self._kept.items()}

    def stats(self) -> LoraStats:
        with self._changed:
            return LoraStats(
                len(self._kept), self._bytes(), self._loads, self._evictions, self._failures,
                self._seconds,
            )  # fmt: skip

    # Files

    def look(self, since: float = math.inf) -> None:
        """Read the directory again, unless a look has begun `since` then, and let go of adapters
        whose files are gone."""
        if self._looked >= since:
            return
        began = time.monotonic()
        self._files.look()
        self._looked = began
        with self._changed:
            for name in self._kept.keys() - self._files.found.keys():
                self._let_go(name)

    def _found(self) -> dict[str, LoraFile]:
        """The files, by their adapters' names."""
        if self._looks:
            self.look()
        return self._offered()

    def _offered(self) -> dict[str, LoraFile]:
        """The same by the last look."""
        with self._changed:
            found = self._files.found
            return {name: file for name, file in found.items() if name not in self._removed}

    # Memory

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Hold `_reading`. Raises LoraError on an engine's thread, if that might be for ever."""
        if not self._reading.acquire(blocking=not inside_any_engine()):
            raise LoraError(
                "Another LoRA is read, perhaps until jobs end that wait for this thread.",
                param="lora",
            )
        try:
            yield
        finally:
            self._reading.release()

    def _read(
        self,
        name: str,
        pinned: dict[Lora, Chosen],
        given_up: Callable[[], bool] = lambda: False,
    ) -> Lora:
        """An adapter in memory, which `pinned` then keeps there. Held: `_reading`."""
        self.look()
        file = _file_of(name, self._offered())
        with self._changed:
            known = self._at_hand(name, file)
            if known is not None:
                self._kept.move_to_end(name)
                pinned[known] = self._in_use([(known, 1.0)])
                return known
            self._check_usable(name, file)
        _check_wanted(given_up)
        began = time.monotonic()
        try:
            adapter = self._fresh(name, file)
        except LoadError as error:
            message = f"The LoRA {shown(name)} cannot be used: {error.message}."
            with self._changed:
                self._failures += 1
            logger.warning("%s", message)
            if isinstance(error.__cause__, OSError):  # another try may succeed
                raise _unreadable(name, error.message) from error
            if self._files.look().get(name) == file:
                with self._changed:
                    self._failed[name] = (file, message)
            raise LoraError(message, param="lora") from error
        seconds = time.monotonic() - began
        with self._changed:
            self._let_go(name)
            self._make_room(adapter, pinned, given_up)
            self._failed.pop(name, None)
            kept = _Kept(adapter, file)
            if name in self._removed:  # meanwhile
                self._leaving.append(kept)
            else:
                self._kept[name] = kept
            self._loads += 1
            self._seconds += seconds
            pinned[adapter] = self._in_use([(adapter, 1.0)])
        logger.info(
            "LoRA %s: rank %s, %s, %.1f MiB (%.1f s)",
            name, "-".join(map(str, dict.fromkeys(adapter.ranks))),
            ", ".join(f"{count} layers of {part}" for part, count in adapter.components.items()),
            adapter.bytes / 2**20, seconds,
        )  # fmt: skip
        return adapter

    def _at_hand(self, name: str, file: LoraFile) -> Lora | None:
        """The adapter of a file, if it is in memory. Held: `_changed`."""
        kept = self._kept.get(name)
        return kept.adapter if kept is not None and kept.file.same(file) else None

    def _check_usable(self, name: str, file: LoraFile) -> None:
        """Raise LoraError for a file that is known to be no use: it is too large, or has failed
        before; UnavailableError for one that cannot be looked at. Held: `_changed`."""
        if file.problem:
            raise _unreadable(name, file.problem)
        failed = self._failed.get(name)
        if failed is not None and failed[0] == file:
            raise LoraError(failed[1], param="lora")
        if file.size > self._max_bytes:
            raise LoraError(
                f"The LoRA {shown(name)} cannot be used: it has {file.size:,} bytes; the limit "
                f"is {self._max_bytes:,}.",
                param="lora",
            )

    def _fresh(self, name: str, file: LoraFile) -> Lora:
        """Read an adapter. Raises LoadError."""
        path = file.path
        content = name, digest(path)
        number = self._numbers.get(content) or next(_numbers)
        # layers know one adapter of a number: a second one would take the first one's place
        adapter = self._living.get(number) or read_lora(
            path, name, number, self._pipeline, device=self._device, twins=self._twins
        )
        if self._files.look().get(name) != file:
            raise LoadError(f"{path.name} has changed while it was read; try again")
        if adapter.bytes > self._max_bytes:
            raise LoadError(f"it takes {adapter.bytes:,} bytes; the limit is {self._max_bytes:,}")
        self._numbers[content] = number
        self._living[number] = adapter
        return adapter

    def _make_room(
        self, adapter: Lora, pinned: Collection[Lora], given_up: Callable[[], bool]
    ) -> None:
        """Wait until there is memory for an adapter next to those `pinned`. Raises LoraError if
        there never will be, and once it is `given_up`. Held: `_changed`."""
        together = list(dict.fromkeys((*pinned, adapter)))
        needed = sum(one.bytes for one in together)
        if needed > self._max_bytes:
            names = ", ".join(one.name for one in together)
            raise LoraError(
                f"The LoRAs {names} take {needed:,} bytes together; the limit is "
                f"{self._max_bytes:,}.",
                param="lora",
            )
        began = time.monotonic()
        try:
            while self._bytes(adapter) > self._max_bytes:
                unused = next((name for name, kept in self._kept.items() if not kept.users), None)
                if unused is not None:
                    del self._kept[unused]
                    self._evictions += 1
                    continue
                if inside_any_engine():
                    raise LoraError(
                        "All memory for LoRAs is in use by jobs that wait for this thread.",
                        param="lora",
                    )
                _check_wanted(given_up)
                self._waiting = began
                # a job's end notifies, but in CPython alone at once; who gives up does not
                self._changed.wait(1.0)
        finally:
            self._waiting = None

    def _let_go(self, name: str) -> None:
        """Forget an adapter, which takes memory as long as jobs use it. Held: `_changed`."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            self._leaving.append(kept)

    def _bytes(self, *others: Lora) -> int:
        """Of the adapters in memory, and of `others`. Held: `_changed`."""
        self._leaving = [kept for kept in self._leaving if kept.users]
        every = {kept.adapter for kept in (*self._kept.values(), *self._leaving)}
        return sum(adapter.bytes for adapter in every.union(others))

    def _in_use(self, adapters: Sequence[tuple[Lora, float]]) -> Chosen:
        """Adapters for a job, which are in use until it lets go of them."""
        chosen = Chosen(adapters)
        with self._changed:
            for adapter, _ in adapters:
                for kept in (*self._kept.values(), *self._leaving):
                    if kept.adapter is adapter:
                        kept.users.add(chosen)
        weakref.finalize(chosen, self._notify).atexit = False
        return chosen

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Kept:
    """An adapter in memory, and the jobs that use it."""

    def __init__(self, adapter: Lora, file: LoraFile) -> None:
        self.adapter = adapter
        self.file = file
        self.users: weakref.WeakSet[Chosen] = weakref.WeakSet()


def _checked(lora: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Names and scales, once they are allowed. Raises LoraError."""
    wanted = pairs_of(lora)
    if len(wanted) > MOST_LORAS:
        raise LoraError(f"{len(wanted)} LoRAs; the limit is {MOST_LORAS}.", code="invalid_value")
    for i, (name, scale) in enumerate(wanted):
        if not -MOST_LORA_SCALE <= scale <= MOST_LORA_SCALE:
            raise LoraError(
                f"The scale of the LoRA {shown(name)} is {scale:g}; it must be "
                f"-{MOST_LORA_SCALE:g} to {MOST_LORA_SCALE:g}.",
                code="invalid_value", param=f"lora.{i}.scale",
            )  # fmt: skip
        if name in (other for other, _ in wanted[:i]):
            raise LoraError(
                f"The LoRA {shown(name)} is named twice.", code="invalid_value", param=f"lora.{i}"
            )
    return wanted


def _check_wanted(given_up: Callable[[], bool]) -> None:
    """Raise LoraError if LoRAs are read for nobody."""
    if given_up():
        raise LoraError("Nobody waits for these LoRAs any more.", param="lora")


def _file_of(name: str, found: Mapping[str, LoraFile]) -> LoraFile:
    """The file of an adapter, of those that were `found`. Raises LoraNotFoundError."""
    if name not in found:
        hint = did_you_mean(name, found)
        have = f"; this model has {listed(sorted(found))}" if found and not hint else ""
        raise LoraNotFoundError(f"There is no LoRA {shown(name)}{hint}{have}.", param="lora")
    return found[name]


def _unreadable(name: str, problem: str) -> UnavailableError:
    return UnavailableError(
        f"The LoRA {shown(name)} cannot be read now: {problem}.", retry_after=RETRY_SECONDS
    )
