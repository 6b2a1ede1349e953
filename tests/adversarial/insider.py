"""Random denoisers aimed at what a proof looks at: the values it tries, the sizes it has seen, the
state it can find.

A case is a small honest network and at most one fault. Each fault stands for a way to pass a proof
that asks too little.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.adversarial.outsider import Case

WIDTH, WORDS = 12, 6
Body = Callable[..., Tensor]
Fault = Callable[[random.Random, "Network"], None]


class Network(nn.Module):
    """Attention over tokens and words, modulated by time and guidance; every row by itself."""

    def __init__(self, seed: int, traits: frozenset[str], dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.enter, self.leave = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
            self.words = nn.Linear(8, 24)
            self.attend = nn.MultiheadAttention(24, 4, batch_first=True)
            self.norm = nn.GroupNorm(4, 24) if "group norm" in traits else nn.LayerNorm(24)
            self.time = nn.Sequential(nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 24))
            self.table = nn.Embedding(64, 24)
        self.traits = traits
        self.tables: dict[Any, Tensor] = {}
        self.to(dtype).eval()

    def moods(self, timestep: Tensor, guidance: Tensor | None, rows: int) -> Tensor:
        time = timestep.reshape(-1, 1).expand(rows, 1).float()
        waves = torch.cat([torch.sin(time * 3.0**i) for i in range(-4, 0)], 1)
        strength = torch.ones(rows, 1) if guidance is None else guidance.reshape(-1, 1).float() / 5
        return self.time(torch.cat([waves, (waves * strength)], 1).to(self.leave.weight.dtype))

    def positions(self, count: int, rows: int) -> Tensor:
        key = (count, rows) if "memo with rows" in self.traits else count
        if "memo" not in self.traits or key not in self.tables:
            place = torch.arange(count)[:, None] * 0.7 ** torch.arange(24)
            self.tables[key] = torch.sin(place).to(self.leave.weight.dtype)
        return self.tables[key]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        mood = self.moods(timestep, guidance, len(x))
        sample = (
            torch.cat([torch.tanh(x[..., :1]), x[..., 1:]], -1) if "outlier" in self.traits else x
        )
        h = self.enter(sample) + mood[:, None] + self.positions(x.shape[1], len(x))
        if label is not None:
            h = h + self.table(label)[:, None]
        words = self.words(encoder_hidden_states)
        hidden = None if encoder_attention_mask is None else ~encoder_attention_mask.bool()
        h = h + self.attend(h, words, words, key_padding_mask=hidden, need_weights=False)[0]
        h = h + self.attend(h, h, h, need_weights=False)[0]
        h = (
            self.norm(h.transpose(1, 2)).transpose(1, 2)
            if "group norm" in self.traits
            else self.norm(h)
        )
        if "long" in self.traits and x.shape[1] > 8:
            h = h * 0.9
        out = torch.tanh(self.leave(h))
        if "outlier" in self.traits:
            out = torch.cat([out[..., :1] + 1e4 * torch.sign(out[..., :1]), out[..., 1:]], -1)
        return out


def around(network: Network, change: Callable[..., Tensor]) -> None:
    """Patch the forward: `change` is given the original one."""
    original = network.forward

    def forward(
        x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **others: Any
    ) -> Tensor:
        given = {"timestep": timestep, "encoder_hidden_states": encoder_hidden_states, **others}
        return change(original, x, **given)

    network.forward = forward  # type: ignore[method-assign]


def one_row_for_all(rng: random.Random, network: Network) -> None:
    name, row = rng.choice(["timestep", "guidance", "encoder_hidden_states"]), rng.choice([0, -1])

    def change(original: Body, x: Tensor, **given: Any) -> Tensor:
        if (
            given.get(name) is not None
            and len(x) > 1
            and given[name].ndim
            and len(given[name]) == len(x)
        ):
            given[name] = (
                given[name][row].expand_as(given[name])
                if row
                else given[name][:1].expand_as(given[name])
            )
        return original(x, **given)

    around(network, change)


def branch_for_all(rng: random.Random, network: Network) -> None:
    limit, every = rng.uniform(0.1, 0.9), rng.choice([torch.all, torch.any])

    def change(original: Body, x: Tensor, **given: Any) -> Tensor:
        return original(x, **given) * (0.5 if every(given["timestep"] < limit) else 1.0)

    around(network, change)


def sample_for_all(rng: random.Random, network: Network) -> None:
    kind = rng.choice(["largest", "mean", "order", "norm"])

    def change(original: Body, x: Tensor, **given: Any) -> Tensor:
        out = original(x, **given)
        if kind == "largest":
            return out * (x / x.abs().max()).abs().mean((1, 2), keepdim=True).add(0.5)
        if kind == "mean":
            return out + rng_share * x.mean(0, keepdim=True)
        if kind == "order":
            return out[x[:, 0, 0].argsort()]
        return out * 3 / (1 + x.norm() / len(x))

    rng_share = rng.uniform(0.01, 0.3)
    around(network, change)


def many_rows(rng: random.Random, network: Network) -> None:
    most = rng.choice([3, 4, 5])

    def change(original: Body, x: Tensor, **given: Any) -> Tensor:
        out = original(x, **given)
        return out + 0.2 * out.flip(0) if len(x) >= most else out

    around(network, change)


def hidden_count(rng: random.Random, network: Network) -> None:
    period, start = rng.randint(2, 9), rng.choice([0, 3])
    counter = itertools.count()
    kept: dict[str, int] = {"calls": 0}
    by = rng.choice(["iterator", "dictionary", "buffer", "hook", "submodule"])
    network.register_buffer("seen", torch.zeros(()))

    def number() -> int:
        if by == "iterator":
            return next(counter)
        if by == "buffer":
            network.seen.data.add_(1)
            return int(network.seen)
        if by == "submodule":
            network.leave.calls = getattr(network.leave, "calls", 0) + 1  # type: ignore[assignment]
            return int(network.leave.calls)  # type: ignore[arg-type]
        kept["calls"] += 1
        return kept["calls"]

    def turn() -> float:
        now = number()
        return 0.6 if now > start and now % period == 0 else 1.0

    if by == "hook":
        network.leave.register_forward_hook(lambda module, args, out: out * turn())
    else:
        around(network, lambda original, x, **given: original(x, **given) * turn())


def kept_result(rng: random.Random, network: Network) -> None:
    kept: list[Tensor | None] = [None, None]
    limit = rng.uniform(0.1, 0.6)

    def change(original: Body, x: Tensor, **given: Any) -> Tensor:
        before, residual = kept
        if before is not None and residual is not None and before.shape == x.shape:
            if (x - before).abs().mean() < limit * before.abs().mean():
                kept[0] = x.clone()
                return x + residual
        out = original(x, **given)
        kept[:] = x.clone(), out - x
        return out

    around(network, change)


def momentum(rng: random.Random, network: Network) -> None:
    def change(original: Body, x: Tensor, **given: Any) -> Tensor:
        out = original(x, **given)
        last = getattr(network, "last", None)
        network.last = out.mean((1, 2)).mean()
        return out if last is None else out + 0.3 * last

    around(network, change)


def leaks_a_little(rng: random.Random, network: Network) -> None:
    share = 0.016 if network.leave.weight.dtype is torch.bfloat16 else 0.04

    def change(original: Body, x: Tensor, **given: Any) -> Tensor:
        out = original(x, **given)
        return torch.cat(
            [out[..., :1], out[..., 1:] + share * (out[..., 1:].mean(0) - out[..., 1:])], -1
        )

    around(network, change)


def draws(rng: random.Random, network: Network) -> None:
    around(network, lambda original, x, **given: original(x, **given) + 3e-5 * torch.randn_like(x))


def writes(rng: random.Random, network: Network) -> None:
    def change(original: Body, x: Tensor, **given: Any) -> Tensor:
        out = original(x, **given)
        x.data.mul_(0.8)
        return out

    around(network, change)


FAULTS: tuple[Fault, ...] = (
    one_row_for_all,
    branch_for_all,
    sample_for_all,
    many_rows,
    hidden_count,
    kept_result,
    momentum,
    leaks_a_little,
    draws,
    writes,
)
TRAITS = (
    "group norm",
    "memo",
    "memo with rows",
    "long",
    "outlier",
    "mask",
    "label",
    "guidance",
    "near",
    "whole times",
)


def generate(seed: int) -> Case:
    """Odd seeds have a fault."""
    rng = random.Random(seed)
    traits = frozenset(trait for trait in TRAITS if rng.random() < 0.4)
    fault = FAULTS[seed // 2 % len(FAULTS)] if seed % 2 else None
    dtype = torch.bfloat16 if rng.random() < 0.2 else torch.float32
    if fault is not None and fault.__name__ in ("one_row_for_all", "leaks_a_little"):
        traits |= {"guidance"}
    if dtype is torch.bfloat16:
        traits -= {"outlier"}
    steps = tuple(rng.choice([5, 6, 8, 10]) for _ in range(4))
    rows = tuple(rng.choice([1, 1, 2]) for _ in range(4))
    # the first steps' times, and guidance, hardly differ, and captions do not
    near = "near" in traits
    chosen = rng.getrandbits(32)

    def build() -> nn.Module:
        network = Network(seed, traits, dtype)
        if fault is not None:
            fault(random.Random(chosen), network)
        return network

    def arguments(job: int, step: int) -> dict[str, Any]:
        count = rows[job % 4]
        own = torch.Generator().manual_seed(10 * seed + (0 if near else job))
        total = steps[job % 4]
        time = 1 - step / total + (1e-5 * job if near else 0)
        words = torch.randn(1 if near else count, WORDS, 8, generator=own).expand(count, -1, -1)
        given: dict[str, Any] = {"encoder_hidden_states": words.to(dtype)}
        whole = "whole times" in traits and (fault is None or fault is not branch_for_all)
        given["timestep"] = torch.tensor(int(999 * time)) if whole else torch.full((count,), time)
        if "guidance" in traits:
            given["guidance"] = torch.full((count,), 3.5 + (1e-4 if near else 1.5) * job)
        if "label" in traits:
            given["label"] = torch.full((count,), 7 * job % 64)
        if "mask" in traits:
            mask = torch.ones(count, WORDS, dtype=torch.bool)
            mask[:, WORDS - job % 3 :] = False
            given["encoder_attention_mask"] = mask
        return given

    shape = (16 if "long" in traits else 8, WIDTH)
    name = f"{seed} {fault.__name__ if fault else 'harmless'}: {', '.join(sorted(traits))}, {dtype}"
    return Case(name, fault is None, build, arguments, shape, dtype, steps, rows)
