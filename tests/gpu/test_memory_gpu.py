"""Memory of a GPU: what a row takes is measured, and what runs out for real is halved, divided or
refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from stepweave import StepEngine
from stepweave.errors import OutOfMemoryError
from stepweave.memory.device import CudaMemory, DeviceMemory, UnknownMemory
from tests.gpu.company import DEVICE
from tests.support.toy import CLOSE, Toy, call, fresh, honest, submit_together
from tests.support.waiting import SECONDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA GPU: its allocator is tested"),
]

EACH = 256 * 2**20  # bytes that a row takes
ROWS = 8  # that fit


class Heavy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        ballast = torch.zeros(len(x), EACH, dtype=torch.uint8, device=DEVICE)
        return honest(x) + ballast[0, 0].cpu()


@pytest.fixture
def small_gpu() -> Iterator[None]:
    """All but the memory for ROWS rows, and a little, taken away from this process."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    room = (ROWS + 0.5) * EACH + torch.cuda.memory_allocated(DEVICE)
    torch.cuda.set_per_process_memory_fraction(room / total, DEVICE)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    torch.cuda.empty_cache()


class Measured(CudaMemory):
    """Without the share of the whole device that is left to others: it is more than this process
    has."""

    def available(self) -> int | None:
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        own = torch.cuda.get_per_process_memory_fraction(DEVICE) * total
        return int(own - torch.cuda.memory_allocated(DEVICE))


@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize(
    "memory", [Measured(DEVICE), UnknownMemory()], ids=["measured", "learnt from failures"]
)
def test_jobs_fit_into_what_there_is(memory: DeviceMemory, say: Callable[[str], None]) -> None:
    calls = [call(seed, rows=1 + seed % 2, steps=12) for seed in range(16)]
    with StepEngine(Toy(Heavy().eval()), knee=False, memory=memory) as engine:
        results = [
            job.result(SECONDS) for job in submit_together(engine, [fresh(one) for one in calls])
        ]
    stats = engine.stats()
    plain = Toy(Heavy().eval())
    for result, one in zip(results, calls, strict=True):
        assert (result - plain(**fresh(one))).abs().max() <= CLOSE
    assert stats.errors == stats.unfit == 0
    assert max(stats.forwards["denoiser"].by_rows) > ROWS / 2
    say(
        f"{stats.out_of_memory} forwards ran out, rows "
        f"{sorted(stats.forwards['denoiser'].by_rows.items())}"
    )
    if isinstance(memory, Measured):
        assert stats.out_of_memory == 0
    else:
        assert stats.out_of_memory > 0


@pytest.mark.usefixtures("small_gpu")
def test_a_call_too_large_is_divided_and_a_row_too_large_refused() -> None:
    many = call(0, rows=3 * ROWS)
    with StepEngine(Toy(Heavy().eval()), knee=False) as engine:
        result = engine.submit(**fresh(many)).result(SECONDS)
        assert engine.stats().divided > 0
    assert result.shape == (3 * ROWS, 3)

    class Larger(Heavy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.repeat(2 * ROWS, 1))[: len(x)]

    with StepEngine(Toy(Larger().eval()), knee=False) as engine, pytest.raises(OutOfMemoryError):
        engine.submit(**fresh(call(0))).result(SECONDS)
