"""The errors that clients get for failed jobs, and their log lines."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from stepweave.calls import SentTensor
from stepweave.errors import (
    DeadlineExceededError,
    ImageCountError,
    InvalidRequestError,
    NonFiniteError,
    StepweaveError,
    duration,
    shown,
)
from stepweave.parameters import OWN_TIMES, Parameters, lora_text
from stepweave.reasons import refusal_of

if TYPE_CHECKING:
    from stepweave.engine import Job
    from stepweave.planning.plan import Estimate

logger = logging.getLogger(__name__)

# what a pipeline raises for values of arguments that its own checks do not look at: an index beyond
# a list, a list of a wrong length, a number that makes the images useless
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    ImageCountError,
    NonFiniteError,
)


def loggable(parameters: Parameters) -> dict[str, Any]:
    """The parameters without prompts and other texts of the pipeline, for the log."""
    texts = {name for name, value in parameters.arguments.items() if "'" in repr(value)}
    return {
        name: value
        for name, value in parameters.of_image(0).items()
        if "prompt" not in name and name not in texts
    }


def failure_of(error: BaseException, job: Job, parameters: Parameters) -> StepweaveError:
    """The client's error for an unexpected exception, logged with its traceback.

    It is InvalidRequestError if the pipeline's own checks rejected its arguments, or if it failed
    with arguments or images that this request has and the warm-up had not; else
    `generation_failed`.
    """
    cause = (error.__cause__ if isinstance(error, StepweaveError) else None) or error
    values, refusal = loggable(parameters), refusal_of(cause)
    if refusal is not None and not job.progress.step:
        logger.warning(
            "the pipeline rejected the arguments of %r, %s; the request fails as invalid_value",
            job,
            values,
            exc_info=error,
        )
        return InvalidRequestError(f"The pipeline rejects these values: {refusal}")
    at_the_end = isinstance(cause, (ImageCountError, NonFiniteError))
    tensors = {
        name: value for name, value in parameters.arguments.items() if isinstance(value, SentTensor)
    }
    own = {**tensors, **parameters.arguments}
    if job.progress.step and not at_the_end:
        # schedulers look up timesteps at each step; latents are decoded after the last one
        own = {name: value for name, value in own.items() if name in (*OWN_TIMES, *tensors)}
    if parameters.sources is not None and not job.progress.step:
        # references, which have a size of their own
        result = parameters.width, parameters.height
        own |= {
            name: " and ".join("{}x{}".format(*image.size) for image in images)
            for name, images in parameters.sources.images.items()
            if any(image.size != result for image in images)
        }
    if parameters.lora and isinstance(cause, NonFiniteError):
        own["lora"] = lora_text(parameters.of_image(0))
    if own and isinstance(cause, REFUSALS):
        names = ", ".join(f"{name}={shown(value)}" for name, value in own.items())
        logger.warning(
            "%r, %s: the pipeline failed with values of this request; it fails as invalid_value",
            job,
            values,
            exc_info=error,
        )
        return InvalidRequestError(
            f"The pipeline fails with these values ({type(cause).__name__}): {names}.",
            param=next(iter(own)),
        )
    logger.error(
        "%r, %s: failed; the request fails as generation_failed", job, values, exc_info=error
    )
    failure = StepweaveError(
        f"The generation failed ({type(cause).__name__}).", code="generation_failed"
    )
    failure.__cause__ = error
    return failure


def missed(
    deadline_ms: int | None, job: Job, steps: int, expected: Estimate | None, *, timed: bool
) -> DeadlineExceededError:
    """The error of a missed deadline: how many of its `steps` the job did, and what was `expected`
    at admission; `timed` is whether any job had been timed then."""
    step = job.progress.step
    if job.loading:
        reached = "its LoRAs were not in memory yet"
    elif job.begun is None:
        reached = "the job was still waiting for its turn"
    elif not step:
        reached = f"the job had begun, and done none of its {steps} steps"
    else:
        reached = f"the job had done {step} of its {steps} steps"
    if expected is not None:
        estimate = (
            f"The estimate was {duration(expected.finish)} ({duration(expected.solo)} on an idle "
            "server)."
        )
    elif timed:
        estimate = "There was no estimate when the request arrived."
    else:
        estimate = "There was no estimate: no job of this model had been timed."
    return DeadlineExceededError(
        f"deadline_ms is {deadline_ms}, which has passed: {reached}. {estimate}"
    )
