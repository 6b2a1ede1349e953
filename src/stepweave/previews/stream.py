"""Makes the previews of one request in order, beside its work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepweave.parameters import Parameters
from stepweave.threads import on_thread

if TYPE_CHECKING:
    from PIL import Image

    from stepweave.previews.decoder import Previewer
    from stepweave.previews.latents import Latents

logger = logging.getLogger(__name__)

LATE_SECONDS = 0.25  # how long a finished image waits for its previews


@dataclass(frozen=True)
class Partial:
    """A preview file."""

    image: int  # index of the image, 0 to n - 1
    number: int  # from 0
    data: bytes


class Partials:
    """The previews of a request. `wants` is for the engine's thread, all else for the event loop.

    After `count` of the steps, previews are made on the threads of `pool`, encoded as files by
    `encode`, and `notify` is called.
    """

    def __init__(
        self,
        previewer: Previewer,
        count: int,
        parameters: Parameters,
        encode: Callable[[Image.Image], bytes],
        pool: Executor,
        notify: Callable[[], None],
    ) -> None:
        self.made: list[Partial] = []
        self._previewer = previewer
        self._count = count
        self._parameters = parameters
        self._encode = encode
        self._pool = pool
        self._notify = notify
        self._last: asyncio.Future[None] | None = None  # the last one that was started
        self._reached = 0  # the last step with a preview: a job that restarts repeats its steps
        self._steps: frozenset[int] | None = None
        self._over = False

    def wants(self, step: int, total: int) -> bool:
        """Whether to make previews after this step."""
        if self._steps is None:
            from stepweave.previews.decoder import preview_steps

            self._steps = frozenset(preview_steps(total, self._count))
        if self._over or step not in self._steps or step <= self._reached:
            return False
        self._reached = step
        return True

    def begin(self, latents: Latents) -> None:
        """Start to make previews of a step."""
        if not self._over:
            self._last = asyncio.ensure_future(self._make(latents, self._last))

    async def settle(self) -> None:
        """Wait at most LATE_SECONDS for previews that were started, then `end`."""
        if self._last is not None:
            await asyncio.wait({self._last}, timeout=LATE_SECONDS)
        self.end()

    def end(self) -> None:
        """Make no more previews, and drop the reference to `notify`."""
        self._over = True
        self._notify = lambda: None

    async def _make(self, latents: Latents, before: asyncio.Future[None] | None) -> None:
        making = on_thread(self._pool, self._files, latents)
        try:
            if before is not None:
                await before  # keep their order: another thread may be slower
            files = await making
        except Exception as error:
            logger.warning("a preview failed: %s: %s", type(error).__name__, error)
            return
        if files and not self._over:
            number = len(self.made) // self._parameters.n
            self.made += [Partial(i, number, data) for i, data in enumerate(files)]
            self._notify()

    def _files(self, latents: Latents) -> list[bytes]:
        if self._over:  # on a thread of the pool
            return []
        width, height = self._parameters.width, self._parameters.height
        rows, image = range(self._parameters.n), self._previewer.image
        return [self._encode(image(latents, width, height, row)) for row in rows]
