"""What clients are told of a job that failed, and what goes to the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from stepweave.errors import DeadlineExceededError, InvalidRequestError, StepweaveError, duration
from stepweave.parameters import Parameters
from stepweave.reasons import refusal_of

if TYPE_CHECKING:
    from stepweave.engine import Job
    from stepweave.planning.plan import Estimate

logger = logging.getLogger(__name__)


def loggable(parameters: Parameters) -> dict[str, Any]:
    """The parameters that a log may have."""
    return {name: value for name, value in parameters.of_image(0).items() if "prompt" not in name}


def failure_of(error: BaseException, job: Job, parameters: Parameters) -> StepweaveError:
    """What to tell of an error that no class of ours explains: InvalidRequestError if the
    pipeline's own checks refused its arguments, else that the generation failed. The log has it
    whole."""
    cause = (error.__cause__ if isinstance(error, StepweaveError) else None) or error
    values, refusal = loggable(parameters), refusal_of(cause)
    if refusal is not None and not job.progress.step:
        logger.warning("a pipeline refused its arguments: %r, %s", job, values, exc_info=error)
        return InvalidRequestError(f"The pipeline refuses these values: {refusal}")
    logger.error("a job failed: %r, %s", job, values, exc_info=error)
    failure = StepweaveError(
        f"The generation failed ({type(cause).__name__}).", code="generation_failed"
    )
    failure.__cause__ = error
    return failure


def missed(
    deadline_ms: int | None, job: Job, steps: int, expected: Estimate | None, *, timed: bool
) -> DeadlineExceededError:
    """A deadline that has passed, as it was sent: how far the job came of its `steps`, and what had
    been `expected`; `timed` is whether anything could be, of any job."""
    step = job.progress.step
    if job.begun is None:
        came = "the job was still waiting for its turn"
    elif not step:
        came = f"it had begun, and done none of its {steps} steps"
    else:
        came = f"it had done {step} of its {steps} steps"
    if expected is not None:
        foreseen = (
            f"It was expected to take {duration(expected.finish)}, or {duration(expected.solo)} "
            "alone."
        )
    elif timed:
        foreseen = "How long it would take could not be foreseen when it came."
    else:
        foreseen = (
            "How long it would take could not be foreseen: nothing of this model had been timed "
            "when it came."
        )
    return DeadlineExceededError(
        f"deadline_ms is {deadline_ms}, which has passed: {came}. {foreseen}"
    )
