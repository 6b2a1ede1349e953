"""Random denoisers, half of them dangerous to merge, written without knowledge of how the engine
decides.

A case is a small network of harmless ingredients; a harmful one gets, besides, one or two harms of
a family: `rows` (rows see their company), `argument`, `branch`, `state`, `reuse`, `write`, `draw`
and `random`. All but `random` (the process's own generators) are reproducible: two fresh copies
give the same result.
"""

from __future__ import annotations

import functools
import math
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Act = Callable[[Tensor], Tensor]
Slot = tuple[Callable[[], Any], Callable[[Any], None]]
EXTRAS = (
    "encoder_hidden_states",
    "pooled_projections",
    "guidance",
    "class_labels",
    "captions",
    "added_cond_kwargs",
)


@dataclass(frozen=True)
class Case:
    name: str
    harmless: bool
    build: Callable[[], nn.Module]
    arguments: Callable[[int, int], dict[str, Any]]
    shape: tuple[int, ...]
    dtype: torch.dtype
    steps: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass
class Output:
    sample: Tensor


@dataclass
class Plan:
    """What a case is made of; `arguments` of a job and a step come from it too."""

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    steps: tuple[int, ...]
    rows: tuple[int, ...]
    blocks: tuple[str, ...]
    given: set[str]
    clock: str  # number, 0-d, one, rows, or live: the same tensor moved on in place
    integer: bool
    top: float  # the first timestep
    traits: set[str]
    output: str
    same: bool  # the same objects at each step of a job
    dim: int = 16
    words: int = 5
    kept: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def made(self, job: int) -> dict[str, Any]:
        rows, seeded = (
            self.rows[job % len(self.rows)],
            torch.Generator().manual_seed(997 * self.seed + job),
        )

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=seeded).to(self.dtype)

        text, lengths = (
            normal(rows, self.words, 8),
            torch.randint(1, self.words + 1, (rows, 1), generator=seeded),
        )
        if "outlier argument" in self.traits:
            text[..., 0] = 2000 + 500 * text[..., 0]
        tokens = math.prod(self.shape[1:]) if len(self.shape) == 3 else self.shape[0]
        angles = torch.outer(torch.arange(tokens), 0.5 ** torch.arange(self.dim))
        every = {
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.arange(self.words) < lengths,
            "pooled_projections": normal(rows, 8) + 0.5 * normal(1, 8),
            "guidance": torch.full((rows,), (1.0, 7.5, 3.5, 3.6, 12.0)[job % 5]),
            "class_labels": torch.randint(0, 10, (rows,), generator=seeded),
            "image_rotary_emb": (angles.cos(), angles.sin()),
            "captions": [normal(int(length) + job % 3, 8) for length in lengths],
            "added_cond_kwargs": {
                "text_embeds": normal(rows, 8),
                "sizes": {"time_ids": normal(rows, 4)},
            },
            "return_dict": False,
        }
        return {name: value for name, value in every.items() if name in self.given}

    def arguments(self, job: int, step: int) -> dict[str, Any]:
        # Objects that live as long as a job are a thread's own: the plain and the served run must
        # not share them.
        key, count = (threading.get_ident(), job), self.steps[job % len(self.steps)]
        if step == 0 or key not in self.kept:
            self.kept[key] = self.made(job)
            self.kept[key]["timestep"] = torch.tensor([self.top])
        given = dict(self.kept[key]) if self.same else self.made(job)
        now = self.top * (1 - step / count)
        when: Any = torch.tensor(int(now) if self.integer else now)
        if self.clock == "number":
            when = int(now) if self.integer else now
        elif self.clock == "live":
            when = self.kept[key]["timestep"]
            when.sub_(self.top / count if step else 0.0)
        elif self.clock != "0-d":
            when = when.repeat(1 if self.clock == "one" else self.rows[job % len(self.rows)])
        return {**given, "timestep": when}


class Block(nn.Module):
    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.GroupNorm(4, dim) if kind == "conv" else nn.LayerNorm(dim)
        self.mood = nn.Linear(dim, 2 * dim)
        self.inner = (
            nn.Conv2d(dim, dim, 3, padding=1) if kind == "conv" else nn.Linear(dim, 3 * dim)
        )
        self.other = nn.Linear(dim, 2 * dim)
        self.outer = nn.Linear(3 * dim if kind == "mlp" else dim, dim)

    def forward(
        self, h: Tensor, mood: Tensor, text: Any = None, mask: Any = None, table: Any = None
    ) -> Tensor:
        scale, shift = self.mood(mood)[:, None].chunk(2, -1)
        y = self.norm(h.transpose(1, 2)).transpose(1, 2) if self.kind == "conv" else self.norm(h)
        y = y * (1 + scale) + shift
        if self.kind == "conv":
            side = math.isqrt(h.shape[1])
            y = self.inner(y.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        elif self.kind == "mlp":
            y = F.gelu(self.inner(y))
        else:
            q, k, v = self.inner(y).chunk(3, -1)
            if self.kind == "cross" and text is not None:
                k, v = self.other(text).chunk(2, -1)
                mask = None if mask is None else mask[:, None]
            else:
                mask = None
                if table is not None:
                    cos, sin = (part.to(h.dtype) for part in table)
                    q, k = (part * cos + part.roll(1, -1) * sin for part in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return h + self.outer(y)


class Body(nn.Module):
    def __init__(self, kinds: Iterable[str], dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind, dim) for kind in kinds)

    def forward(
        self, h: Tensor, mood: Tensor, text: Any = None, mask: Any = None, table: Any = None
    ) -> Tensor:
        for block in self.blocks:
            h = block(h, mood, text, mask, table)
        return h


class Tap(nn.Module):
    """A function as a layer."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act

    def forward(self, h: Tensor) -> Tensor:
        return self.act(h)


@functools.lru_cache
def waves(tokens: int, dim: int) -> Tensor:
    return torch.sin(torch.outer(torch.arange(tokens), 0.7 ** torch.arange(dim)))


class Net(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.traits, self.output, self.top, self.dim = (
            frozenset(plan.traits),
            plan.output,
            plan.top,
            plan.dim,
        )
        self.memo: dict[tuple[int, ...], Tensor] = {}
        self.channels = plan.shape[0] if len(plan.shape) == 3 else plan.shape[1]
        self.enter, self.leave = (
            nn.Linear(self.channels, self.dim),
            nn.Linear(self.dim, self.channels),
        )
        self.time, self.look, self.label = (
            nn.Linear(12, self.dim),
            nn.Embedding(1002, self.dim),
            nn.Embedding(10, 16),
        )
        self.context, self.pooled, self.ids = (
            nn.Linear(8, self.dim),
            nn.Linear(8, self.dim),
            nn.Linear(4, self.dim),
        )
        self.body, self.tail = Body(plan.blocks, self.dim), nn.Sequential()
        self.register_buffer(
            "tame",
            torch.tensor([1 / 2000 if "outlier argument" in plan.traits else 1.0] + [1.0] * 7),
        )

    def clock(self, timestep: Any, x: Tensor) -> Tensor:
        when = (
            timestep if isinstance(timestep, Tensor) else torch.tensor([timestep], device=x.device)
        )
        when = when.reshape(-1).expand(x.shape[0])
        if "lookup" in self.traits:
            return self.look((when * (1000 / self.top)).long().clamp(0, 1001))
        back = None
        if "unique" in self.traits:
            when, back = torch.unique(when, return_inverse=True)
        angle = when[:, None].float() / self.top * torch.arange(1, 7, device=x.device)
        y = 2 * self.time(torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype))
        return y if back is None else y[back]

    def places(self, shape: tuple[int, ...]) -> Tensor:
        # What is kept depends on shapes alone, so it is no state that a job could notice.
        if "cached table" in self.traits:
            return waves(*shape[1:])
        key = shape if "memo with rows" in self.traits else shape[1:]
        if key in self.memo:
            return self.memo[key]
        table = waves.__wrapped__(*shape[1:]).expand(key).clone()
        if self.traits & {"memo", "memo with rows"}:
            self.memo[key] = table
        return table

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        guidance: Tensor | None = None,
        class_labels: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        captions: list[Tensor] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        x, traits, image = sample, self.traits, sample.ndim == 4
        h = x.flatten(2).transpose(1, 2) if image else x
        first = h[..., :1]
        if "outlier output" in traits:
            h = torch.cat([torch.tanh(first), h[..., 1:]], -1)
        mood = self.clock(timestep, x)
        if pooled_projections is not None:
            mood = mood + self.pooled(pooled_projections)
        if guidance is not None:
            mood = mood + torch.sin(guidance.float()[:, None] / 4 + torch.arange(self.dim)).to(
                x.dtype
            )
        if class_labels is not None:
            mood = mood + self.label(class_labels)
        if captions is not None:
            mood = mood + self.pooled(torch.stack([one.mean(0) for one in captions]))
        if added_cond_kwargs is not None:
            mood = mood + self.pooled(added_cond_kwargs["text_embeds"])
            mood = mood + self.ids(added_cond_kwargs["sizes"]["time_ids"])
        if "row branch" in traits:
            mood = torch.stack([one if float(one[0]) > 0 else -one.roll(1) for one in mood])
        text = (
            None
            if encoder_hidden_states is None
            else self.context(encoder_hidden_states * self.tame)
        )
        h = self.enter(h) + 0.5 * self.places((*h.shape[:2], self.dim)).to(h.dtype)
        if h.shape[1] > 16 and "long inputs" in traits:
            h = h - h.mean(1, keepdim=True)
        h = self.body(h, mood, text, encoder_attention_mask, image_rotary_emb)
        if "double" in traits:
            h = (h.double() / (1 + h.double().square().mean(-1, keepdim=True)).sqrt()).to(x.dtype)
        if "row loop" in traits:
            h = torch.stack([one * torch.sigmoid(one.mean(0)) * 2 for one in h])
        if "outlier" in traits:
            h = torch.cat([8000 + 1000 * torch.tanh(h[..., :1]), h[..., 1:]], -1)
        h = self.tail(h)
        if "outlier" in traits:
            h = torch.cat([(h[..., :1] - 8000) / 1000, h[..., 1:]], -1)
        y = 1.5 * torch.tanh(2 * self.leave(h))
        if "outlier output" in traits:
            # Every second step undoes it, so that the result is of ordinary size after an even
            # number of them.
            far = torch.where(
                first.abs() < 50, first.new_tensor(3000.0), (-3 * first).clamp(-9000, 9000)
            )
            y = torch.cat([far, y[..., 1:]], -1)
        y = y.transpose(1, 2).reshape(x.shape) if image else y
        if not return_dict or self.output == "tuple":
            return (y, h.mean(1)) if "two outputs" in traits else (y,)
        return {"dict": {"sample": y}, "dataclass": Output(y)}.get(self.output, y)


def change(output: Any, act: Act) -> Any:
    if isinstance(output, tuple):
        return (act(output[0]), *output[1:])
    if isinstance(output, dict):
        return {"sample": act(output["sample"])}
    return Output(act(output.sample)) if isinstance(output, Output) else act(output)


def bump(h: Tensor, amount: float) -> Tensor:
    """A change that no later norm takes back."""
    return h + amount * h.roll(1, -1)


# Rows that see their company: `h` has the rows first, `a` is how strong the effect is.


def column(values: Tensor, h: Tensor) -> Tensor:
    return values.to(h.dtype).view(-1, *[1] * (h.ndim - 1))


def attend(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h, h, h)


def scan(h: Tensor) -> Tensor:
    done = [h[0]]
    for row in h[1:]:
        done.append(0.5 * done[-1] + row)
    return torch.stack(done)


ROWS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "first row": lambda h, a: h + a * h[:1],
    "last row": lambda h, a: h + a * h[-1:],
    "row parity": lambda h, a: h + a * column(torch.arange(len(h)) % 2, h) * h.roll(1, -1),
    "row number": lambda h, a: h + a * column(torch.arange(len(h)).cos(), h) * h.roll(1, -1),
    "rolled rows": lambda h, a: h + a * h.roll(1, 0),
    "flipped rows": lambda h, a: h + a * h.flip(0),
    "mean": lambda h, a: h + a * h.mean(0, keepdim=True),
    "max": lambda h, a: h + a * h.amax(0, keepdim=True),
    "deviation": lambda h, a: h + a * h.std(0, keepdim=True, correction=0),
    "sorted rows": lambda h, a: h + a * h.sort(0).values,
    "cumsum": lambda h, a: h + a * h.cumsum(0),
    "scan": lambda h, a: (1 - a) * h + a * scan(h),
    "argmax": lambda h, a: h + a * h[h.flatten(1).sum(1).argmax()],
    "any": lambda h, a: bump(h, a * float((h.flatten(1).mean(1) > 0.02).any())),
    "all": lambda h, a: bump(h, a * float((h.flatten(1).mean(1) > -0.02).all())),
    "row count": lambda h, a: bump(h, a * len(h) / 2),
    "from 3 rows": lambda h, a: bump(h, a) if len(h) >= 3 else h,
    "from 5 rows": lambda h, a: bump(h, a) if len(h) >= 5 else h,
    "batch norm": lambda h, a: (1 - a) * h + a * F.batch_norm(h, None, None, training=True),
    "softmax over rows": lambda h, a: h + 2 * a * h.softmax(0),
    "one scale": lambda h, a: torch.round(h / (step := h.abs().amax() / (2 + int(2 / a)))) * step,
    "one norm": lambda h, a: h + 4 * a * h.roll(1, -1) / h.abs().amax(),
    "quantile": lambda h, a: h.clamp(max=float(h.float().quantile(1 - a))),
    "halves": lambda h, a: h + a * (h.roll(len(h) // 2, 0) if len(h) % 2 == 0 else 0),
    "reshape": lambda h, a: h + a * h.reshape(h.shape[1], len(h), *h.shape[2:]).transpose(0, 1),
    "packed attention": lambda h, a: h + 2 * a * attend(h.reshape(1, -1, h.shape[-1])).view_as(h),
    "attention over rows": lambda h, a: (
        h + 2 * a * attend(h.flatten(1) / h[0].numel() ** 0.25).view_as(h)
    ),
    "einsum": lambda h, a: (
        h + a * torch.einsum("r...,s->r...", h, h.flatten(1)[:, 0].tanh()) / len(h) ** 0.5
    ),
    "index_add": lambda h, a: (
        h + a * torch.zeros_like(h[:1]).index_add(0, torch.zeros(len(h)).long(), h)
    ),
    "loop": lambda h, a: torch.stack([row + a * h[i - 1] for i, row in enumerate(h)]),
    "numpy": lambda h, a: h + a * torch.from_numpy(h.float().numpy().mean(0)).to(h.dtype),
    "python": lambda h, a: bump(h, 8 * a * (sum(h[:, 0].flatten().tolist()) / h[:, 0].numel())),
    "strided": lambda h, a: (
        h + a * h.contiguous().as_strided(h.shape, (0, *h.contiguous().stride()[1:]))
    ),
    "storage": lambda h, a: (
        h + a * h.new_empty(0).set_(h.untyped_storage()).view(-1, *h.shape[1:]).mean(0)
    ),
}


# Where state hides. Each is new with each build, so that a fresh copy is fresh.


def slot(kind: str, net: Net, name: str) -> Slot:
    if kind == "global":
        space: dict[str, Any] = {}
        exec(
            "kept = None\ndef get(): return kept\ndef put(value):\n    global kept\n    kept = "
            "value",
            space,
        )
        return space["get"], space["put"]
    if kind in ("buffer", "buffer in place"):
        net.register_buffer(name, None, persistent=False)

        def put(value: Any) -> None:
            value, old = torch.as_tensor(value), getattr(net, name)
            if kind == "buffer in place" and old is not None and old.shape == value.shape:
                old.copy_(value)
            else:
                setattr(net, name, value.clone())

        return lambda: getattr(net, name), put
    if kind == "default argument":

        def box(value: Any, cell: Any) -> Any:
            cell.append(value)

        box.__defaults__ = ([None],)
        return lambda: box.__defaults__[0][-1], box
    if kind == "list":
        net.log = {**getattr(net, "log", {}), name: [None]}
        return lambda: net.log[name][-1], lambda value: net.log[name].append(value)
    if kind == "weak dictionary":
        weak: Any = weakref.WeakKeyDictionary({net: None})
        return lambda: weak[net], lambda value: weak.__setitem__(net, value)
    owner: Any = {
        "attribute": net,
        "class attribute": type(net),
        "parameter attribute": net.leave.weight,
        "submodule": net.body.blocks[-1].norm,
        "closure": Tap(lambda h: h),
        "function attribute": lambda: None,
        "thread": threading.local(),
    }[kind]
    return lambda: getattr(owner, name, None), lambda value: setattr(owner, name, value)


SLOTS = (
    "attribute",
    "class attribute",
    "parameter attribute",
    "submodule",
    "closure",
    "function attribute",
    "thread",
)
SLOTS += ("global", "buffer", "buffer in place", "default argument", "list", "weak dictionary")


def counted(get: Any, put: Any) -> int:
    count = int(get() or 0)
    put(count + 1)
    return count


STATES = ("period", "period", "from", "first call", "ramp", "sign", "ema", "momentum", "first seen")


def stateful(kind: str, period: int, a: float, kept: Slot) -> Act:
    get, put = kept

    def act(h: Tensor) -> Tensor:
        if kind in ("ema", "momentum", "first seen"):
            old = get()
            known = old is not None and old.shape == (h.shape[1:] if kind == "ema" else h.shape)
            if kind == "ema":
                put((0.8 * old + 0.2 * h.mean(0) if known else h.mean(0)).detach())
                return h - 2 * a * get()
            if not known or kind == "momentum":
                put(h.detach().clone())
            return (1 - a) * h + a * old.roll(1, -1) if known else h
        n = counted(get, put)
        on = {
            "period": n % period == period - 1,
            "from": n >= 7 + period,
            "first call": n == 0,
            "ramp": True,
            "sign": n // period % 2 == 1,
        }[kind]
        return bump(h, a * min(n, 20) / 5 if kind == "ramp" else a) if on else h

    return act


def place(net: Net, where: str, act: Act) -> nn.Module:
    """Have `act` work on a tensor inside the module; returns the outermost module."""
    part: Any = net.body.blocks[len(net.body.blocks) // 2] if "block" in where else net.body
    part = net.context if "context" in where else net if "whole" in where else part
    if where == "tail":
        net.tail.append(Tap(act))
    elif where == "subclass, whole output":
        forward = type(net).forward
        net.__class__ = type(
            "Late",
            (type(net),),
            {"forward": lambda self, *a, **k: change(forward(self, *a, **k), act)},
        )
    elif where.startswith("pre-hook"):
        part.register_forward_pre_hook(
            lambda module, args, kw: ((act(args[0]), *args[1:]), kw), with_kwargs=True
        )
    elif where.startswith("hook"):
        part.register_forward_hook(lambda module, args, output: change(output, act))
    else:
        inner = part.forward
        if where.endswith("input"):
            part.forward = lambda x, *a, **k: inner(act(x), *a, **k)
        else:
            part.forward = lambda *a, **k: change(inner(*a, **k), act)
    return net


PLACES = (
    "tail",
    "subclass, whole output",
    "pre-hook, whole",
    "hook, whole",
    "pre-hook, body",
    "hook, body",
)
PLACES += (
    "pre-hook, block",
    "hook, block",
    "patched body input",
    "patched body output",
    "patched block output",
)
PLACES += ("patched whole input", "patched whole output")


class Outer(nn.Module):
    """A module around another, with a say in its call."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, sample: Tensor, timestep: Any, **kw: Any) -> Any:
        return self.call(self.inner, sample, timestep=timestep, **kw)


def around(net: Net, wrapped: bool, call: Callable[..., Any]) -> nn.Module:
    if wrapped:
        return Outer(net, call)
    inner = net.forward
    net.forward = lambda sample, *a, **kw: call(inner, sample, *a, **kw)
    return net


PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda v: v[:1].expand_as(v),
    "last": lambda v: v[-1:].expand_as(v),
    "max": lambda v: v.amax(0, keepdim=True).expand_as(v),
    "mean": lambda v: v.double().mean(0, keepdim=True).to(v.dtype).expand_as(v),
    "sorted": lambda v: v.sort(0).values,
    "flip": lambda v: v.flip(0),
    "roll": lambda v: v.roll(1, 0),
    "cummax": lambda v: v.cummax(0).values,
}


def picked(value: Any, pick: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: picked(one, pick) for name, one in value.items()}
    if isinstance(value, list):  # padded to the longest of the batch
        longest = max(len(one) for one in value)
        return [F.pad(one, (0, 0, 0, longest - len(one))) for one in value]
    if not isinstance(value, Tensor):
        return value
    value = value.reshape(-1) if value.ndim == 0 else value
    return pick(value.long()).bool() if value.dtype is torch.bool else pick(value)


def flat(value: Any) -> Tensor:
    return torch.as_tensor(value).reshape(-1).float()


def tests(top: float, c: float) -> dict[str, Callable[[Tensor, dict[str, Any]], float]]:
    """Branches, and two smooth ones that near values hardly show; `c` is between 0 and 1."""

    def spread(value: Any, whole: float) -> float:
        return float(flat(value).max() - flat(value).min()) / whole

    def raises(x: Tensor) -> bool:
        if len(x) >= 3 + int(3 * c):
            raise ValueError("too many rows")
        return False

    return {
        "all times low": lambda x, kw: bool((flat(kw["timestep"]) < c * top).all()),
        "any time low": lambda x, kw: bool((flat(kw["timestep"]) < c * top).any()),
        "all times late": lambda x, kw: bool((flat(kw["timestep"]) < (0.2 + 0.2 * c) * top).all()),
        "times differ": lambda x, kw: len(flat(kw["timestep"]).unique()) > 1,
        "times far apart": lambda x, kw: spread(kw["timestep"], top) > c / 4,
        "times smoothly apart": lambda x, kw: min(1, 3 * spread(kw["timestep"], top)) ** 3,
        "one time": lambda x, kw: (
            not isinstance(kw["timestep"], Tensor) or kw["timestep"].numel() == 1
        ),
        "large sample": lambda x, kw: bool(x.abs().max() > 2.6 + c),
        "wide sample": lambda x, kw: bool(x.float().std() > 0.8 + 0.5 * c),
        "signed sample": lambda x, kw: x.float().sum().item() > 0,
        "odd rows": lambda x, kw: len(x) in (3, 5, 7),
        "raises from some rows on": lambda x, kw: raises(x),
        "guidance mean": lambda x, kw: bool(kw["guidance"].mean() > 3 + 3 * c),
        "guidance differs": lambda x, kw: bool((kw["guidance"] != kw["guidance"][0]).any()),
        "guidance far apart": lambda x, kw: spread(kw["guidance"], 3) > c,
        "guidance smoothly apart": lambda x, kw: min(1, spread(kw["guidance"], 6)) ** 3,
        "pooled mean": lambda x, kw: bool(kw["pooled_projections"].float().mean() > 0.1 * c - 0.05),
        "full mask": lambda x, kw: bool(kw["encoder_attention_mask"][:, 2].all()),
    }


def write(value: Any, how: str, factor: float) -> None:
    for one in value if isinstance(value, (tuple, list)) else [value]:
        if how == "data":
            one.data.mul_(factor)
        elif how == "numpy" and one.dtype is not torch.bfloat16:
            one.detach().numpy()[...] *= factor
        elif how == "index":
            one[..., :1] = factor * one[..., -1:]
        else:
            one.mul_(factor)


Install = Callable[[Net], nn.Module]


def harm(rng: random.Random, plan: Plan, family: str) -> tuple[str, Install]:
    """A harm's name and what puts it into a network. Everything random is drawn here, not when it
    is built."""
    half = plan.dtype is torch.bfloat16
    a, period = math.exp(rng.uniform(math.log(0.06), math.log(0.5))), 2 + rng.randrange(10)
    a = 0.3 + 0.6 * a if half else a
    where, wrapped, keep = rng.choice(PLACES), rng.random() < 0.4, rng.choice(SLOTS)
    mark = rng.randrange(1000)  # two harms must not share a name
    by = "a wrapper" if wrapped else "patched forward"
    if "encoder_hidden_states" in plan.given and "cross" in plan.blocks and rng.random() < 0.1:
        where = "hook, context"
    if family == "rows":
        kind = rng.choice(sorted(ROWS))
        if "outlier" in plan.traits:
            where, a = "tail", rng.uniform(0.03, 0.08)
        if kind == "storage":
            where = "patched whole input"
        everywhere = half and rng.random() < 0.4
        if everywhere:  # faint in each place, in the dirt of the format
            a, kind = (
                rng.uniform(0.01, 0.02),
                rng.choice(["cumsum", "index_add", "rolled rows", "flipped rows"]),
            )

        def act(h: Tensor) -> Tensor:
            if "outlier" in plan.traits and where == "tail":
                return torch.cat([h[..., :1], ROWS[kind](h[..., 1:], a)], -1)
            return ROWS[kind](h, a)

        def install(net: Net) -> nn.Module:
            for one in (
                ("pre-hook, body", "tail", "hook, whole", "pre-hook, whole") if everywhere else ()
            ):
                place(net, one, act)
            return net if everywhere else place(net, where, act)

        return f"rows: {kind} {a:.2f} at {'many places' if everywhere else where}", install
    if family == "argument":
        known = plan.given & {*EXTRAS, "encoder_attention_mask"} | {"timestep"}
        known -= (
            set() if "cross" in plan.blocks else {"encoder_hidden_states", "encoder_attention_mask"}
        )
        name = rng.choice(sorted(known))
        pick = rng.choice(sorted(PICKS))

        def call(inner: Any, x: Tensor, timestep: Any, **kw: Any) -> Any:
            kw["timestep"] = timestep
            kw[name] = picked(kw[name], PICKS[pick])
            return inner(x, **kw)

        return f"argument: {pick} of {name} by {by}", lambda net: around(net, wrapped, call)
    if family == "branch":
        c = rng.uniform(0.2, 0.95)
        needs = {
            "guidance": "guidance",
            "pooled": "pooled_projections",
            "full": "encoder_attention_mask",
        }
        every = [
            name
            for name in tests(1, c)
            if needs.get(name.split()[0], "timestep") in plan.given | {"timestep"}
        ]
        every = [name for name in every if name != "one time" or plan.clock != "rows"]
        kind, amount, test = (name := rng.choice(every)), max(a, 0.15), tests(plan.top, c)[name]

        def call(inner: Any, x: Tensor, timestep: Any, **kw: Any) -> Any:
            on = test(x, {**kw, "timestep": timestep})
            return change(
                inner(x, timestep=timestep, **kw), lambda y: bump(y, on * amount) if on else y
            )

        return f"branch: {kind} ({c:.2f}) {amount:.2f} by {by}", lambda net: around(
            net, wrapped, call
        )
    if family == "state":
        kind, amount = rng.choice(STATES), max(0.2, min(2 * a, 0.9))

        def install(net: Net) -> nn.Module:
            return place(net, where, stateful(kind, period, amount, slot(keep, net, f"seen{mark}")))

        return f"state: {kind} {period} {amount:.2f} in {keep} at {where}", install
    if family == "reuse":
        every_k, limit = rng.randint(2, 5), rng.uniform(0.2, 0.6)
        kind = rng.choice(["every k-th", "little change", "same time"])
        keep = "attribute" if keep == "thread" else keep

        def install(net: Net) -> nn.Module:
            count, old, rest, spent, body = (
                *(slot(keep, net, f"of{i}x{mark}") for i in range(4)),
                net.body.forward,
            )

            def forward(h: Tensor, mood: Tensor, *more: Any) -> Tensor:
                seen, key = old[0](), mood if kind == "same time" else h
                shapes = [None if one is None else one.shape for one in (rest[0](), seen)]
                fits = shapes == [h.shape, key.shape]
                use = counted(*count) % every_k != 0
                if fits and kind != "every k-th":
                    far = float((key - seen).abs().mean() / seen.abs().mean())
                    total = far + (float(spent[0]() or 0) if kind == "little change" else 0)
                    use = total < limit
                    spent[1](total if use else 0.0)
                if kind == "little change" or not (fits and use):
                    old[1](key.detach().clone())
                if fits and use:
                    return h + rest[0]()
                y = body(h, mood, *more)
                rest[1]((y - h).detach())
                return y

            net.body.forward = forward
            return net

        return f"reuse: residual, {kind}, {every_k}, {limit:.2f} in {keep}", install
    if family == "write":
        known = {
            "encoder_hidden_states",
            "pooled_projections",
            "guidance",
            "image_rotary_emb",
        } & plan.given
        known -= set() if {"cross"} & {*plan.blocks} else {"encoder_hidden_states"}
        known -= set() if {"attention"} & {*plan.blocks} else {"image_rotary_emb"}
        name, how = (
            rng.choice(["sample", *sorted(known)]),
            rng.choice(["in place", "data", "numpy", "index"]),
        )
        name = "timestep" if plan.clock == "live" and rng.random() < 0.5 else name
        how, factor = (
            ("data" if how == "index" and name in ("timestep", "guidance") else how),
            rng.uniform(0.5, 0.8),
        )

        def call(inner: Any, x: Tensor, timestep: Any, **kw: Any) -> Any:
            output = inner(x, timestep=timestep, **kw)
            write({**kw, "sample": x, "timestep": timestep}[name], how, factor)
            return output

        plan.same = True  # a write into what the caller throws away would not matter
        return f"write: {name} {how} {factor:.2f} by {by}", lambda net: around(net, wrapped, call)
    amp = math.exp(rng.uniform(math.log(3e-5), math.log(1e-2)))
    if family == "draw":
        kind, amount = (
            rng.choice(["own generator", "seeded at each call", "reseeds the default"]),
            max(a, 0.15),
        )

        def install(net: Net) -> nn.Module:
            own = torch.Generator().manual_seed(plan.seed)

            def act(h: Tensor) -> Tensor:
                if kind == "reseeds the default":
                    torch.manual_seed(5)
                    return h + amount * torch.randn_like(h)
                generator = own if kind == "own generator" else torch.Generator().manual_seed(5)
                return h + amount * torch.randn(h.shape, generator=generator).to(h.dtype)

            return place(net, where, act)

        return f"draw: {kind} {amount:.2f} at {where}", install
    noise: dict[str, Act] = {
        "normal": lambda h: h + amp * torch.randn_like(h),
        "uniform": lambda h: h + amp * torch.rand(h.shape).to(h.dtype),
        "dropout": lambda h: F.dropout(h, amp, training=True),
        "python": lambda h: bump(h, amp * random.random()),
        "numpy": lambda h: bump(h, amp * float(np.random.random())),
    }
    kind = rng.choice(sorted(noise))
    return f"random: {kind} {amp:.1e} at {where}", lambda net: place(net, where, noise[kind])


FAMILIES = {
    "rows": 9,
    "argument": 4,
    "branch": 5,
    "state": 6,
    "reuse": 4,
    "write": 4,
    "draw": 2,
    "random": 2,
}


TRAITS = (
    "lookup",
    "unique",
    "cached table",
    "memo",
    "memo with rows",
    "row branch",
    "row loop",
    "long inputs",
)
TRAITS += ("double", "outlier argument", "two outputs")


def generate(seed: int) -> Case:
    """Odd seeds are harmful."""
    rng = random.Random(seed)
    family = rng.choices(list(FAMILIES), list(FAMILIES.values()))[0] if seed % 2 else ""
    half = rng.random() < 0.2
    shape = rng.choice([(4, 8, 8), (4, 4, 4), (3, 6, 6), (16, 12), (9, 8), (25, 6)])
    traits = {one for one in TRAITS if rng.random() < 0.15}
    if not half and rng.random() < 0.25:
        traits.add(rng.choice(["outlier", "outlier output"]))
    given = {one for one in EXTRAS if rng.random() < 0.35}
    given |= {one for one in ("image_rotary_emb", "return_dict") if rng.random() < 0.25}
    given |= (
        {"encoder_attention_mask"}
        if "encoder_hidden_states" in given and rng.random() < 0.5
        else set()
    )
    if half:  # a sign that rounding may flip is no harmless branch
        traits -= {"row branch"}
    clock = rng.choices(["number", "0-d", "one", "rows", "live"], [1, 3, 2, 4, 1])[0]
    integer = clock != "live" and rng.random() < 0.35
    plan = Plan(
        seed=seed,
        shape=shape,
        dtype=torch.bfloat16 if half else torch.float32,
        steps=rng.choice(
            [
                (5, 6, 8, 8),
                (6, 10, 10, 4),
                (8, 6, 12, 12),
                (12, 4, 8, 10),
                (6, 8, 8, 8),
                (11, 12, 4, 12),
            ]
        ),
        rows=rng.choice([(1, 2, 1, 2), (1, 1, 2, 1), (2, 1, 1, 2), (1, 1, 1, 1), (1, 2, 2, 1)]),
        blocks=tuple(
            rng.choice(["attention", "cross", "conv", "mlp"]) for _ in range(rng.randint(2, 3))
        ),
        given=given,
        clock=clock,
        integer=integer,
        top=1000.0 if integer or rng.random() < 0.5 else 1.0,
        traits=traits,
        output=rng.choice(["tensor", "tensor", "tuple", "dict", "dataclass"]),
        same=rng.random() < 0.4,
    )
    harms = [harm(rng, plan, family)] if family else []
    if family not in ("", "random") and rng.random() < 0.2:
        harms.append(harm(rng, plan, rng.choice(["rows", "state"])))

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = type("Net", (Net,), {})(plan).to(plan.dtype).eval().requires_grad_(False)
        root: nn.Module = net
        # Backwards, as the first harm may wrap the network, and the second never does.
        for _, install in reversed(harms):
            root = install(net)
        return root.eval()

    looks = [*plan.blocks, *sorted(traits), *sorted(given), f"{clock} clock", plan.output]
    looks += ["bf16"] * half + ["same objects"] * plan.same
    name = (
        f"{seed} {' + '.join(text for text, _ in harms) or 'harmless'} | "
        f"{'x'.join(map(str, shape))} "
    )
    name += ", ".join(looks)
    return Case(name, not family, build, plan.arguments, shape, plan.dtype, plan.steps, plan.rows)


# A self-check: do the harms matter to an engine that trusts every module?


def tensor_of(output: Any) -> Tensor:
    output = (
        output["sample"]
        if isinstance(output, dict)
        else output[0]
        if isinstance(output, tuple)
        else output
    )
    return output.sample if isinstance(output, Output) else output


def merge(values: list[Any], rows: list[int]) -> Any:
    one = values[0]
    if isinstance(one, dict):
        return {name: merge([value[name] for value in values], rows) for name in one}
    if isinstance(one, list):
        return [row for value in values for row in value]
    if isinstance(one, tuple) or isinstance(one, (bool, type(None))):
        return one
    if not isinstance(one, Tensor) or one.ndim == 0 or len(one) == 1:
        if all(
            bool(flat(value).equal(flat(one)))
            for value in values
            if not isinstance(value, Tensor) or value.numel() == 1
        ):
            if not isinstance(one, Tensor) or one.ndim == 0:
                return one
        values = [torch.as_tensor(v) for v in values]
        values = [
            v.expand(n, *v.shape[1:]) if v.ndim else v.expand(n)
            for v, n in zip(values, rows, strict=True)
        ]
    return torch.cat(values)


@torch.no_grad()
def together(case: Case, jobs: list[int], mode: str) -> list[Tensor]:
    """The jobs' results of one shared module: merged at each tick, the same with late joiners, or
    in turns."""
    net, step, late = case.build(), dict.fromkeys(jobs, 0), mode == "staggered"
    xs = {
        job: torch.randn(case.rows[job], *case.shape, generator=torch.Generator().manual_seed(job))
        for job in jobs
    }
    xs = {job: x.to(case.dtype) for job, x in xs.items()}
    for tick in range(max(case.steps) + len(jobs)):
        now = [job for job in jobs if step[job] < case.steps[job] and (not late or tick >= job)]
        for group in [[job] for job in now] if mode == "turns" else [now] if now else []:
            rows = [case.rows[job] for job in group]
            given = [case.arguments(job, step[job]) for job in group]
            x = xs[group[0]] if len(group) == 1 else torch.cat([xs[job] for job in group])
            y = tensor_of(net(x, **(given[0] if len(group) == 1 else merge(given, rows))))
            for job, part in zip(group, y.split(rows), strict=True):
                xs[job], step[job] = 0.9 * xs[job] + 0.3 * part, step[job] + 1
    return list(xs.values())


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference by the scale of the result, an outlier channel aside."""
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / one.abs().max())


def main(first: int = 0, end: int = 200) -> None:
    say, by, slow = sys.stdout.write, {}, 0.0
    worst = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for case in map(generate, range(first, end)):
        plain, again, took = [], [], math.inf
        for _ in range(2):
            start, again = time.perf_counter(), plain
            plain = [together(case, [job], "turns")[0] for job in range(4)]
            took = min(took, 1e3 * (time.perf_counter() - start) / sum(case.steps))
        far, slow, family = [], max(slow, took), case.name.split()[1].strip(":")
        for mode in ("merged", "staggered", "turns"):
            try:
                far.append(max(map(apart, plain, together(case, [0, 1, 2, 3], mode))))
            except ValueError:
                far.append(math.inf)
        bound = 0 if family == "random" else 5e-2 if case.dtype is torch.bfloat16 else 1e-3
        differs = [True, max(far) > bound, *(value > bound for value in far)]
        by[family] = [
            total + one for total, one in zip(by.get(family, [0] * 5), differs, strict=True)
        ]
        if case.harmless:
            worst[case.dtype] = max(worst[case.dtype], *far)
        wrong = {
            "differs" if case.harmless else "does not matter": differs[1] == case.harmless,
            "not reproducible": family != "random" and not all(map(torch.equal, plain, again)),
            "unbounded": not all(float(x.abs().max()) < 3e4 for x in plain),
            f"slow, {took:.1f} ms": took > 3,
        }
        for what in filter(wrong.get, wrong):
            say(f"{what} ({', '.join(f'{value:.1e}' for value in far)}): {case.name}\n")
    say("family: cases, differing, of these merged, merged with late joiners, in turns\n")
    for family, numbers in sorted(by.items()):
        say(f"  {family}: {', '.join(map(str, numbers))}\n")
    cases, differing = map(
        sum, list(zip(*(by[one] for one in by if one != "harmless"), strict=True))[:2]
    )
    say(f"{differing} of {cases} harmful cases differ; a harmless one by at most ")
    say(
        f"{', '.join(f'{far:.1e}' for far in worst.values())} (float32, bfloat16); slowest "
        f"{slow:.1f} ms a step\n"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
