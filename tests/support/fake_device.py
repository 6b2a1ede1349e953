"""A GPU that is not there: tensors say that they are on it, are computed on the CPU, and what is
read from it is noted.

    with fake_device() as device:
        pipeline = tiny.FAMILIES["flux"].build().to(CUDA)
        with device.engine(pipeline) as engine:
            engine.submit(...).result()
        print(device.reads)

Operations refuse tensors of two devices, as a GPU's do. `device.engine` makes an engine whose
thread is under the mode that does all this. What is known of it is placement, and who waits for
values; not numbers of a GPU, nor memory, streams and threads.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

from stepweave import StepEngine
from stepweave.engine import hooks, loop, runner
from stepweave.memory.device import UnknownMemory
from stepweave.planning.clock import HostClock

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

# operations after which the host needs the result, or its size
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "nonzero_numpy",
}
ACROSS = {
    "_to_copy",
    "copy_",
    "_copy_from",
    "index",
    "index_put_",
    "index_put",
    "_index_put_impl_",
}  # may be given tensors of two devices


class OnDevice(torch.Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CUDA,
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    # torch's own ways want a guard of the device, which a build without CUDA lacks

    def contiguous(
        self, *, memory_format: torch.memory_format = torch.contiguous_format
    ) -> torch.Tensor:  # type: ignore[override]
        return (
            self
            if self.is_contiguous(memory_format=memory_format)
            else self.clone(memory_format=memory_format)
        )

    def nonzero(self, *, as_tuple: bool = False) -> Any:  # type: ignore[override]
        found = aten.nonzero(self)
        return found.unbind(1) if as_tuple else found

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied: torch.Tensor = aten.copy_(self, other, non_blocking)
        return copied

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, key: Any) -> Any:
        return _indexed(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, torch.Tensor) and key.ndim:
            aten.index_put_(
                self, [key], torch.as_tensor(value, dtype=self.dtype, device=self.device)
            )
        else:
            _indexed(self, key).copy_(value) if isinstance(value, torch.Tensor) else _indexed(
                self, key
            ).fill_(value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _indexed(tensor: torch.Tensor, key: Any) -> Any:
    """`tensor[key]`, made of other operations."""
    keys = list(key) if isinstance(key, tuple) else [key]
    masks = (
        one
        for one in keys
        if isinstance(one, torch.Tensor) and one.dtype is torch.bool and one.ndim
    )
    taken = sum(one is not None and one is not Ellipsis for one in keys) + sum(
        mask.ndim - 1 for mask in masks
    )
    if not any(one is Ellipsis for one in keys):
        keys.append(Ellipsis)
    at = next(i for i, one in enumerate(keys) if one is Ellipsis)
    keys[at : at + 1] = [slice(None)] * (tensor.ndim - taken)
    indices: list[torch.Tensor | None] = []
    for one in keys:
        dimension = len(indices)
        if one is None:
            tensor = tensor.unsqueeze(dimension)
        elif isinstance(one, slice):
            tensor = (
                aten.slice(tensor, dimension, one.start, one.stop, one.step or 1)
                if one != slice(None)
                else tensor
            )
        elif isinstance(one, torch.Tensor) and one.dtype is torch.bool and one.ndim:
            indices += one.nonzero().unbind(1)
            continue
        elif isinstance(one, (list, torch.Tensor)) and not (
            isinstance(one, torch.Tensor) and not one.ndim
        ):
            indices.append(torch.as_tensor(one))
            continue
        else:
            tensor = tensor.select(dimension, int(one))  # a tensor's number is waited for
            continue
        indices.append(None)
    return (
        aten.index(tensor, indices)
        if any(one is not None for one in indices)
        else aten.alias(tensor)
    )


@dataclass(frozen=True)
class Read:
    """A value that the host waited for: the operation, and the package and line that called it."""

    operation: str
    package: str  # stepweave, diffusers, transformers or tests
    place: str
    shape: tuple[int, ...]
    dtype: torch.dtype


_reads: list[Read] = []


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.partition("::")[2]
    if name == "_fused_sdp_choice":
        return 0  # plain arithmetic: the CPU lacks the GPU's kernels
    given = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = [one for one in given if isinstance(one, OnDevice)]
    wanted = kwargs.get("device")
    if (
        there
        and name not in ACROSS
        and any(one.ndim and not isinstance(one, OnDevice) for one in given)
    ):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} found at least two "
            f"devices, cuda:0 and cpu!"
        )
    on_device = bool(there) if wanted is None else torch.device(wanted).type == "cuda"
    if name in ("copy_", "index_put_", "_index_put_impl_"):
        on_device = isinstance(args[0], OnDevice)
        if not on_device and there:
            _note(name, there[0])
    elif name in WAITING and there or (there and not on_device):
        _note(name, there[0])
    elif name == "index" and any(
        isinstance(one, OnDevice) and one.dtype in (torch.bool, torch.uint8)
        for one in args[1]
        if one is not None
    ):
        _note(name, there[0])
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(_held, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if name == "_to_copy" and on_device and len(given) == 1 and out is plain_args[0]:
        out = out.clone()
    if on_device:
        out = tree_map(lambda one: OnDevice(one) if isinstance(one, torch.Tensor) else one, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there and on_device else out


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _note(name: str, tensor: torch.Tensor) -> None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in ("diffusers", "transformers", "stepweave", "tests"):
            if f"/{package}/" in path and "fake_device" not in path:
                _reads.append(
                    Read(
                        name,
                        package,
                        f"{path.rpartition('/')[2]}:{frame.f_code.co_name}",
                        tuple(tensor.shape),
                        tensor.dtype,
                    )
                )
                return
        frame = frame.f_back
    _reads.append(Read(name, "", "", tuple(tensor.shape), tensor.dtype))


class Mode(TorchDispatchMode):
    """Makes tensors that are created on the GPU, or moved there, `OnDevice`."""

    def __enter__(self) -> Mode:
        self._lifts = torch._C._only_lift_cpu_tensors()
        # `torch.tensor(..., device=...)` creates a tensor on the CPU and moves it
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FakeDevice:
    """Records `reads` from the device, and the threads that made it current: `used`."""

    def __init__(self) -> None:
        self.reads = _reads
        self.used: dict[str, torch.device] = {}  # by the names of threads

    def use(self, device: Any) -> None:
        self.used[threading.current_thread().name] = torch.device(device)

    @contextlib.contextmanager
    def using(self, device: Any) -> Iterator[None]:
        self.use(device)
        yield

    @contextlib.contextmanager
    def engine(self, pipeline: Any, **options: Any) -> Iterator[StepEngine]:
        run = loop.StepLoop._run

        def under_the_mode(self: Any) -> None:
            with Mode():
                run(self)

        # a mode could not be carried across a suspension; this one stays on the thread
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(loop.StepLoop, "_run", under_the_mode))
            stack.enter_context(patch.object(runner, "clock_of", lambda device: HostClock()))
            stack.enter_context(patch.object(hooks, "suspendable", lambda: True))
            yield stack.enter_context(StepEngine(pipeline, memory=UnknownMemory(), **options))

    def own_reads(self) -> list[Read]:
        """The reads by Stepweave's code, without diffusers' and transformers'."""
        return [read for read in self.reads if read.package == "stepweave"]


@contextlib.contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """Simulate a GPU on this thread and on its engines' threads."""
    device = FakeDevice()
    _reads.clear()
    with contextlib.ExitStack() as stack:
        for name, instead in {
            "_lazy_init": lambda: None,
            "set_device": device.use,
            "device": device.using,
            "default_generators": (torch.Generator(),),
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, instead))
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(Mode())
        stack.enter_context(torch.no_grad())
        yield device
