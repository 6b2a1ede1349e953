"""Calls: what a fiber wants computed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from stepweave.batching.batch_axes import Guess, Path, Readings
from stepweave.compat.attention_processors import Processors, Worn
from stepweave.compat.torch_state import Ambient
from stepweave.scheduling.task import Key, Task

if TYPE_CHECKING:
    from stepweave.certification.state_watch import StateWatch

# A layout says for each argument how calls are merged; nested tuples, the tag first, so that it is
# hashable.
Layout = tuple[Any, ...]

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
    cached: bool = False  # results are remembered: an encoder of prompts or pictures
    processors: Processors | None = None  # where calls swap attention processors
    readings: Readings = field(default_factory=Readings, repr=False)
    watch: StateWatch | None = field(default=None, repr=False)  # None: not looked after
    names: tuple[str, ...] = field(init=False)
    # argument -> the argument that masks its second dimension
    masks: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        names = (
            _named(self.function)
            or _named(original_of(self.module).forward)
            or _class_named(self.module)
        )
        masks = {}
        for name in names:
            base, number = re.fullmatch(r"(.*?)(_\d+)?", name).groups()  # type: ignore[union-attr]
            for mask in (
                f"{name}_mask",
                *(f"{one}{number or ''}" for one in _MASK_NAMES.get(base, ())),
            ):
                if mask in names:
                    masks[name] = mask
                    break
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "masks", masks)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, in the signature's order for those given by position."""
        if len(args) > len(self.names):
            raise Unmergeable(f"{self.name} was given {len(args)} positional arguments")
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


@dataclass(eq=False, repr=False)
class Call:
    """One suspended call. `describe` sets the rest."""

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ambient: Ambient
    worn: Worn = None  # the attention processors that it is to run with, if they are its job's own
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    sample: Any = None  # the argument that tells how many
    layout: Layout = ()
    leaves: list[tuple[Any, ...]] = field(
        default_factory=list
    )  # tensors and numbers of the rows, in the layout's order
    # of the leaves, and their layouts' tags
    paths: list[tuple[Path, str]] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)  # readings that are not the first
    look: Hashable = None  # what those do
    chunks: int = 1  # parts of the rows, of which those of all calls lie together when merged
    holds: bool = False  # an argument is an object taken for what it holds
    kind: Hashable = None  # what a certificate is for
    constants: Hashable = None  # what is no leaf: a certificate covers every value of it
    key: Hashable = None  # what calls of one group have in common: the kind and the constants
    listed: bool = False  # the sample is a list with an entry for each row
    opaque: bool = False  # an argument is told from others by its identity only
    # sizes in which calls of one group may differ, where a certificate allows it
    ragged: Hashable = None
    # of those sizes: least and most of each argument
    extents: list[tuple[int, int]] = field(default_factory=list)
    cost: Key = field(init=False)  # what its forward's seconds depend on
    cap: int = 0  # rows that its forward was allowed
    owner: Any = None  # set by the loop, as are task and since: who waits for it
    task: Task = field(default_factory=Task)
    since: float = 0.0  # when it began to wait
    cache_key: Hashable | None = None  # of its result, where results are remembered
    # run alone, the fiber leaves a copy of the result in `output`, and says how it went
    keep: bool = False
    output: Any = None
    failed: bool = False
    wrote: bool = False  # to its own arguments
    ran_out: bool = False  # of memory, run alone
    overwritten: bool = False  # by an attempt that ran out of memory: it cannot be made again
    retried: bool = False  # whole, since there was more room
    check: bool = False  # run alone, its fiber looks whether the module keeps something of it
    looked: float = 0.0  # seconds that this took
    # of leaves, as far as they are known: see evidence
    spans: dict[int, Any] = field(default_factory=dict)
    apart: tuple[str, str] = ("", "")  # why it can share no forward: a code and a text
    own: bool = False  # it is to run on modules that its job's own code has changed
    whole: bool = False  # it must be run as the pipeline made it, neither merged nor divided

    def __post_init__(self) -> None:
        self.cost = Key(self.target.name, 0)

    def run(self) -> Any:
        """Exactly what the pipeline asked for."""
        return self.target.function(*self.args, **self.kwargs)

    def stand_alone(self, code: str = "not_comparable", reason: str = "") -> None:
        """Be like no other call, and why."""
        self.kind = self.key = object()
        self.apart = (code, reason)
        self.layout, self.leaves, self.guesses, self.cache_key = (), [], [], None


def original_of(module: nn.Module) -> nn.Module:
    """The module that a compiled one was made of, with names for its arguments; any other as it
    is."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def _named(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)


def _class_named(module: nn.Module) -> tuple[str, ...]:
    """The names of the class's own forward, where a patched one passes on whatever it is given."""
    return _named(type(original_of(module)).forward)[1:]
