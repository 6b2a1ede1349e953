"""Batches steps of the embedded model's denoiser without Stepweave: requests of one kind join the
running batch at a step's boundary, each at its own timestep, and leave after their last step."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from benchmarks.ladder.servers.model import CALL, MAX_BATCH, Asked

TURN = 2.0  # seconds after which a batch admits no more if requests of another kind wait

RULES: dict[str, Callable[[Asked], Hashable]] = {
    # the step-batching loops of 2023: one number of steps, size and guidance
    "equal": lambda asked: asked.kind,
    # FLUX in Xinference: one size
    "size": lambda asked: (asked.width, asked.height),
}


class Waiting(NamedTuple):
    """A request that is in no batch yet."""

    number: int  # in the order of arrival
    asked: Asked
    future: Future[Image]


@dataclass(eq=False)
class Running:
    """A request in the batch."""

    asked: Asked
    future: Future[Image]
    scheduler: Any
    latents: torch.Tensor  # [1, channels, height, width]
    prompt: torch.Tensor  # [rows, tokens, width]; with guidance two rows, the unconditional first
    pooled: torch.Tensor  # [rows, width]
    done: int = 0  # steps

    @property
    def rows(self) -> int:
        return len(self.prompt)

    @property
    def timestep(self) -> torch.Tensor:
        timestep: torch.Tensor = self.scheduler.timesteps[self.done]
        return timestep


class StepLoop:
    """Runs steps on a thread of its own while there are requests."""

    def __init__(
        self,
        pipeline: Any,
        kind: Callable[[Asked], Hashable],
        max_batch: int = MAX_BATCH,
        turn: float = TURN,
    ) -> None:
        self._pipeline = pipeline
        self._kind = kind
        self._max_batch = max_batch
        self._turn = turn
        self._waiting: dict[Hashable, collections.deque[Waiting]] = {}  # by kind
        self._count = itertools.count()
        self.wake = threading.Condition()  # no request is admitted while it is held
        self._batch: list[Running] = []
        self._began = 0.0  # when the batch was empty for the last time
        self._closed = False
        self.largest = 0  # batch, in requests
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, asked: Asked) -> Future[Image]:
        future: Future[Image] = Future()
        with self.wake:
            queue = self._waiting.setdefault(self._kind(asked), collections.deque())
            queue.append(Waiting(next(self._count), asked, future))
            self.wake.notify()
        return future

    def close(self) -> None:
        """End the thread once there are no requests."""
        with self.wake:
            self._closed = True
            self.wake.notify()
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while (admitted := self._admit()) is not None:
                try:
                    self._batch += self._prepare(admitted)
                    self._step()
                    self._finish()
                except Exception as error:
                    futures = [one.future for one in admitted]
                    for future in {*futures, *(one.future for one in self._batch)}:
                        if not future.done():
                            future.set_exception(error)
                    self._batch = []

    def _admit(self) -> list[Waiting] | None:
        """Requests that join now; None once the loop is closed and has nothing to do. A new batch
        is of the kind of the request that has waited longest."""
        with self.wake:
            while not self._batch and not self._waiting:
                if self._closed:
                    return None
                self.wake.wait()
            if self._batch:
                kind = self._kind(self._batch[0].asked)
                others = any(other != kind for other in self._waiting)
                if others and time.monotonic() > self._began + self._turn:
                    return []
            else:
                kind = min(self._waiting, key=lambda kind: self._waiting[kind][0].number)
                self._began = time.monotonic()
            queue = self._waiting.get(kind, collections.deque())
            count = min(len(queue), self._max_batch - len(self._batch))
            admitted = [queue.popleft() for _ in range(count)]
            if count and not queue:
                del self._waiting[kind]
            return admitted

    def _prepare(self, admitted: Sequence[Waiting]) -> list[Running]:
        """Encode the prompts of requests with and of those without guidance together."""
        prepared = []
        for guided in (True, False):
            joining = [one for one in admitted if (one.asked.guidance > 1) == guided]
            if not joining:
                continue
            prompt, negative, pooled, negative_pooled = self._pipeline.encode_prompt(
                [one.asked.prompt for one in joining],
                None,
                None,
                do_classifier_free_guidance=guided,
                **CALL,
            )
            texts = [negative, prompt] if guided else [prompt]
            pools = [negative_pooled, pooled] if guided else [pooled]
            for i, (_, asked, future) in enumerate(joining):
                prepared.append(
                    Running(
                        asked,
                        future,
                        self._scheduler(asked),
                        self._latents(asked, prompt.dtype),
                        torch.cat([rows[i : i + 1] for rows in texts]),
                        torch.cat([rows[i : i + 1] for rows in pools]),
                    )
                )
        return prepared

    def _scheduler(self, asked: Asked) -> Any:
        """A scheduler of the request's own, since it keeps the step's number."""
        shared = self._pipeline.scheduler
        scheduler = type(shared).from_config(shared.config)
        scheduler.set_timesteps(asked.steps)
        return scheduler

    def _latents(self, asked: Asked, dtype: torch.dtype) -> torch.Tensor:
        channels = self._pipeline.transformer.config.in_channels
        latents: torch.Tensor = self._pipeline.prepare_latents(
            1, channels, asked.height, asked.width, dtype, torch.device("cpu"), asked.generator
        )
        return latents

    def _step(self) -> None:
        """One forward of the denoiser for the whole batch, and each scheduler's step."""
        batch = self._batch
        self.largest = max(self.largest, len(batch))
        predicted = self._pipeline.transformer(
            hidden_states=torch.cat([one.latents.expand(one.rows, -1, -1, -1) for one in batch]),
            timestep=torch.cat([one.timestep.expand(one.rows) for one in batch]),
            encoder_hidden_states=torch.cat([one.prompt for one in batch]),
            pooled_projections=torch.cat([one.pooled for one in batch]),
            return_dict=False,
        )[0]
        for one, rows in zip(batch, predicted.split([one.rows for one in batch]), strict=True):
            if one.rows == 2:
                unconditional, conditional = rows.chunk(2)
                rows = unconditional + one.asked.guidance * (conditional - unconditional)
            (one.latents,) = one.scheduler.step(rows, one.timestep, one.latents, return_dict=False)
            one.done += 1

    def _finish(self) -> None:
        """Decode the images of the requests that are done, those of one size together."""
        done = [one for one in self._batch if one.done == one.asked.steps]
        if not done:
            return
        vae, processor = self._pipeline.vae, self._pipeline.image_processor
        latents = torch.cat([one.latents for one in done])
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images = processor.postprocess(vae.decode(latents, return_dict=False)[0])
        self._batch = [one for one in self._batch if one not in done]
        for one, image in zip(done, images, strict=True):
            one.future.set_result(image)
