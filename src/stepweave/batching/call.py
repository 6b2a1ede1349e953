"""Calls: what a fiber wants computed."""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stepweave.batching.batch_axes import Guess, Path, Readings
from stepweave.batching.leaves import Layout, Leaf
from stepweave.compat.attention_processors import AttentionProcessors, Installed
from stepweave.compat.row_adapters import most_adapters
from stepweave.compat.torch_state import Ambient
from stepweave.reasons import UnsharedNote, UnsharedReason
from stepweave.scheduling.task import Key, Task

# diffusers' names of a padding mask for an argument, besides the argument's own name and "_mask"
_MASK_NAMES = {"encoder_hidden_states": ("encoder_attention_mask", "encoder_mask")}


class Unmergeable(Exception):
    """Calls, or their results, cannot be put together or taken apart; the message says why."""


@dataclass(frozen=True, eq=False)
class Target:
    """Something heavy that fibers call: a module's forward, or a method of an autoencoder."""

    name: str  # as in "transformer", "vae.decode"
    module: nn.Module
    function: Callable[..., Any]
    cap: int | None = None  # rows at a time, where it has a bound of its own
    cached: bool = False  # results are remembered: an encoder of prompts or images
    processors: AttentionProcessors | None = None  # where calls swap attention processors
    readings: Readings = field(default_factory=Readings, repr=False)
    names: tuple[str, ...] = field(init=False)
    # argument -> the argument that masks its second dimension
    masks: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        original = original_of(self.module)
        names = _named(self.function) or _named(original.forward)
        if not names:  # a patched one passes on whatever it is given: the class's own has names
            names = _named(type(original).forward)[1:]
        masks = {}
        for name in names:
            base, number = re.fullmatch(r"(.*?)(_\d+)?", name).groups()  # type: ignore[union-attr]
            others = (f"{one}{number or ''}" for one in _MASK_NAMES.get(base, ()))
            mask = next((mask for mask in (f"{name}_mask", *others) if mask in names), None)
            if mask is not None:
                masks[name] = mask
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "masks", masks)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, in the signature's order for those given by position."""
        if len(args) > len(self.names):
            raise Unmergeable(f"{self.name} was given {len(args)} positional arguments")
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


@dataclass(frozen=True, eq=False)
class Group:
    """What calls that may share a forward have in common. `LayoutReader` works it out."""

    key: Hashable = None  # equal for calls of one group: the kind and the constants
    kind: Hashable = None  # what a certificate is for
    constants: Hashable = None  # what is no leaf: a certificate covers every value of it
    layout: Layout = ()
    listed: bool = False  # the sample is a list with an entry for each row
    look: Hashable = None  # what the job's own attention processors do
    # parts of a call's rows, of which those of all calls lie together when merged
    chunks: int = 1


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """What a fiber wants computed, and how it is read."""

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ambient: Ambient
    # the attention processors that it is to run with, if they are its job's own
    processors: Installed = None
    owner: Any = None  # the job whose fiber waits for it
    since: float = field(default_factory=time.monotonic)  # when it began to wait

    group: Group = Group()
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    sample: Any = None  # the argument that tells how many
    size: int = 0  # elements of a row of the sample
    leaves: list[tuple[Any, ...]] = field(default_factory=list)  # tensors and numbers of the rows
    paths: list[tuple[Path, Leaf]] = field(default_factory=list)  # of the leaves, and their kinds
    guesses: list[Guess] = field(default_factory=list)  # readings that are not the first
    spans: dict[int, Any] = field(default_factory=dict)  # of leaves, as far as they are known
    # sizes in which calls of one group may differ, where a certificate allows it; and of these the
    # least and the most of each argument
    ragged: Hashable = None
    extents: list[tuple[int, int]] = field(default_factory=list)
    opaque: bool = False  # an argument is told from others by its identity only
    holds: bool = False  # an argument is an object taken for what it holds

    cache_key: Hashable | None = None  # of its result, where results are remembered
    alone: UnsharedNote | None = None  # why it can share no forward
    on_own_modules: bool = False  # it is to run on modules that its job's own code has changed
    whole: bool = False  # it must be run as the pipeline made it, neither merged nor divided

    @property
    def key(self) -> Hashable:
        """Equal for calls of one group."""
        return self.group.key

    @property
    def kind(self) -> Hashable:
        """What a certificate is for."""
        return self.group.kind

    @functools.cached_property
    def cost(self) -> Key:
        """What its forward's seconds depend on, besides the rows."""
        return Key(self.target.name, self.size, most_adapters(self.kwargs))

    @property
    def task(self) -> Task:
        """Its job, as the scheduler sees it."""
        task: Task = self.owner.task
        return task

    def run(self) -> Any:
        """Exactly what the pipeline asked for."""
        return self.target.function(*self.args, **self.kwargs)

    def but(self, **changes: Any) -> Call:
        """The call with other values of some fields. Several times a step, so not by
        `dataclasses.replace`, which takes 20 times as long."""
        changed = object.__new__(Call)
        changed.__dict__.update(self.__dict__)
        changed.__dict__.pop("cost", None)  # of the old values
        changed.__dict__.update(changes)
        return changed

    def by_itself(
        self, code: UnsharedReason = "not_comparable", reason: str = "", **changes: Any
    ) -> Call:
        """The call as one that is like no other, and why."""
        alone = object()
        changes = {"leaves": [], "guesses": [], "cache_key": None} | changes
        return self.but(group=Group(alone, alone), alone=(code, reason), **changes)


@dataclass(eq=False)
class Attempt:
    """One run of a call by its own fiber: what the fiber is told, and how it went."""

    call: Call
    keep: bool = False  # leave a copy of the result in `output`
    run: Callable[[Call], Any] = Call.run  # what looks at the module runs it in its own way
    again: bool = False  # it ran out of memory before, and there is more room now
    output: Any = None
    failed: bool = False
    ran_out: bool = False  # of memory
    wrote: bool = False  # to its own arguments
    overwritten: bool = False  # though it ran out of memory: it cannot be made again


def original_of(module: nn.Module) -> nn.Module:
    """The module that a compiled one was made of, with names for its arguments; any other as it
    is."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def _named(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)
