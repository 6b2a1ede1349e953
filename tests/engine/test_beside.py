"""An engine that also has the modules of other pipelines, such as ControlNets."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from stepweave import StepEngine
from stepweave.adapters.control_pipelines import control_pipeline, guides_of
from stepweave.errors import EngineMisuseError
from tests.pipelines.parts import HINTS, diffusion, trained
from tests.pipelines.registry import example_image
from tests.support.together import SECONDS, TOLERANCE, difference, numbers, submit_together

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def pipelines() -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion, and two ControlNets for it that have an effect."""
    torch.manual_seed(0)
    base = diffusers.StableDiffusionPipeline(**diffusion())
    base.set_progress_bar_config(disable=True)
    nets = {}
    for name in ("canny", "depth"):
        nets[f"controlnet.{name}"] = trained(
            diffusers.ControlNetModel.from_unet(base.unet, **HINTS)
        )
    for part in (*base.components.values(), *nets.values()):
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return base, nets


def request(seed: int, *guides: int) -> dict[str, Any]:
    images = [example_image(number) for number in guides]
    control = {} if not images else {"image": images[0] if len(images) == 1 else images}
    return {
        "prompt": f"{seed} rings",
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 3 + seed % 2,
        "guidance_scale": 5.0,
        "height": 16,
        "width": 16,
        "output_type": "np",
        **control,
    }


def test_jobs_with_and_without_different_ones_are_right_together_and_share_the_unet() -> None:
    base, nets = pipelines()
    canny, depth = nets.values()
    one, other = control_pipeline(base, [canny]), control_pipeline(base, [depth])
    both = control_pipeline(base, [canny, depth])
    jobs = [
        (base, lambda: request(1)),
        (one, lambda: request(1, 51)),
        (other, lambda: request(1, 51)),
        (both, lambda: request(1, 51, 57)),
        (base, lambda: request(2)),
        (one, lambda: request(2, 52)),
        (both, lambda: request(2, 52, 58)),
    ]
    expected = [numbers(pipeline(**make())) for pipeline, make in jobs]
    assert len({image.numpy().tobytes() for image in expected}) == len(jobs)
    with StepEngine(base, knee=False, beside=nets) as engine:
        for _ in range(2):
            requests = [
                lambda make=make, pipeline=pipeline: {**make(), "pipeline": pipeline}
                for pipeline, make in jobs
            ]
            done = submit_together(engine, requests)
            found = [numbers(job.result(SECONDS)) for job in done]
            assert max(map(difference, found, expected)) <= TOLERANCE
        forwards = engine.stats().forwards
        assert forwards["unet"].merged_calls > 0
        assert forwards["controlnet.canny"].merged_calls > 0, "alone and beside the other"
        exact = engine.submit(**request(2, 52, 58), pipeline=both, reproducible=True)
        assert torch.equal(numbers(exact.result(SECONDS)), expected[-1])


def test_only_the_pipelines_modules_and_those_beside_are_taken_and_set_free_again() -> None:
    base, nets = pipelines()
    canny, depth = nets.values()
    one, both = control_pipeline(base, [canny]), control_pipeline(base, [canny, depth])
    with StepEngine(base, beside={"controlnet.canny": canny}) as engine:
        assert engine.takes(one) and not engine.takes(both)
        with pytest.raises(EngineMisuseError, match=r"controlnet\.1 is not a module"):
            engine.submit(**request(1, 51, 57), pipeline=both)
        with pytest.raises(EngineMisuseError, match=r"controlnet\.canny belongs to another"):
            StepEngine(diffusers.StableDiffusionPipeline(**diffusion()), beside=nets)
    assert all(not hasattr(net, "_diffusers_hook") for net in (canny, depth))
    with StepEngine(base, "threads", beside=nets) as engine:
        found = engine.submit(**request(1, 51), pipeline=one).result(SECONDS)
    assert difference(numbers(found), numbers(one(**request(1, 51)))) <= TOLERANCE


def test_several_controlnets_are_known_one_by_one() -> None:
    base, nets = pipelines()
    both = control_pipeline(base, list(nets.values()))
    assert guides_of(both) == list(nets.values())
    assert guides_of(base) == []
