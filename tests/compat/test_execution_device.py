"""Where the pipelines of jobs run."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

from stepweave.engine import StepEngine
from tests.support import tiny

HOOKED = torch.device("meta")  # the device of the hooks


def device_of_view(pipeline: Any) -> tuple[torch.device, bool]:
    """Where the view of a job runs, and whether it searches for hooks."""
    with StepEngine(pipeline) as engine:
        assert engine._loop is not None
        view = engine._loop.scope_of(None).view()
        assert isinstance(view, type(pipeline))
        assert type(view).__name__ == type(pipeline).__name__
        searches = type(view)._execution_device is type(pipeline)._execution_device
        return view._execution_device, searches


def test_without_hooks_it_is_the_models_device_and_no_module_is_searched() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion"].build()
    assert device_of_view(pipeline) == (pipeline._execution_device, False)


def test_a_hook_of_accelerate_on_a_part_tells_it() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion"].build()
    for module in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
        add_hook_to_module(module, AlignDevicesHook(execution_device=HOOKED))
    assert pipeline._execution_device == HOOKED
    assert device_of_view(pipeline) == (HOOKED, True)


def test_a_hook_of_diffusers_on_a_part_is_searched_for() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion"].build()
    cpu = torch.device("cpu")
    apply_group_offloading(pipeline.unet, cpu, cpu, offload_type="leaf_level")
    assert device_of_view(pipeline) == (cpu, True)


def test_hooks_that_are_added_later_are_found_by_the_next_job() -> None:
    pipeline = tiny.FAMILIES["stable_diffusion"].build()
    with StepEngine(pipeline) as engine:
        assert engine._loop is not None
        scope = engine._loop.scope_of(None)
        assert scope.view()._execution_device.type == "cpu"
        for module in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
            add_hook_to_module(module, AlignDevicesHook(execution_device=HOOKED))
        assert scope.view()._execution_device == HOOKED


def test_a_pipeline_that_tells_its_device_itself_is_asked() -> None:
    plain = tiny.FAMILIES["stable_diffusion"].build()

    class Telling(type(plain)):  # type: ignore[misc]
        @property
        def _execution_device(self) -> torch.device:
            return HOOKED

    plain.__class__ = Telling
    assert device_of_view(plain) == (HOOKED, True)


def test_sub_pipelines_do_not_search_either() -> None:
    pipeline = tiny.FAMILIES["stable_cascade"].build()
    with StepEngine(pipeline) as engine:
        assert engine._loop is not None
        view = engine._loop.scope_of(None).view()
        plain = DiffusionPipeline._execution_device
        for part in (view, view.prior_pipe, view.decoder_pipe):
            assert type(part)._execution_device is not plain
            assert part._execution_device.type == "cpu"
