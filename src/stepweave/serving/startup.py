"""Loads the model: device, weights, previews, engine, first images. Imports torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stepweave.config import Settings
from stepweave.serving import heap
from stepweave.serving.status import Stage

if TYPE_CHECKING:
    import torch

    from stepweave.config.preset import Preset
    from stepweave.engine import StepEngine
    from stepweave.planning.planner import OnStep
    from stepweave.previews.decoder import Previewer
    from stepweave.scheduling import Policy
    from stepweave.serving.model import ServedModel

logger = logging.getLogger(__name__)

# of the progress of a start, at the begin and the end of a stage
SHARES = {"downloading": (0.1, 0.4), "loading": (0.4, 0.8)}
LoadPipeline = Callable[[Settings, "torch.device", "torch.dtype"], "tuple[Any, Preset]"]
# stage, progress from 0 to 1, message; raises LoadError if the server is shutting down
Enter = Callable[[Stage, float, str], None]


@dataclass(frozen=True)
class Loaded:
    """The result of `load`."""

    model: ServedModel
    engine: StepEngine
    previewer: Previewer | None
    device: str
    dtype: str
    threads: int  # of the CPU
    warmed_up: bool


def load(
    settings: Settings,
    load_pipeline: LoadPipeline | None,
    on_step: OnStep,
    enter: Enter,
    policy: Policy,
) -> Loaded:
    """Load and warm up, calling `enter` at each stage. Raises LoadError, and torch's errors."""
    enter("importing", 0.05, "importing torch and diffusers")
    from stepweave.adapters.beside import load_beside
    from stepweave.adapters.embeddings import load_embeddings
    from stepweave.adapters.served_loras import loras_of
    from stepweave.compat.modular import is_modular, with_declared_call
    from stepweave.compat.torch_state import use_device
    from stepweave.engine import StepEngine
    from stepweave.loading import loader
    from stepweave.loading.device import choose_device, choose_dtype, set_cpu_threads
    from stepweave.loading.optimizations import apply_optimizations, check_optimizations
    from stepweave.previews.decoder import Previewer
    from stepweave.serving.model import ServedModel
    from stepweave.serving.warm_up import warm_up

    device = choose_device(settings)
    use_device(device)
    dtype = choose_dtype(settings, device)
    check_optimizations(settings, device)
    threads = set_cpu_threads(settings)
    place = f"{settings.model_name()} onto {device} in {dtype}"

    def on_progress(stage: Literal["downloading", "loading"], share: float, message: str) -> None:
        low, high = SHARES[stage]
        text = f"{place}: {message}" if stage == "loading" else message
        enter(stage, low + share * (high - low), text)

    if settings.is_local():
        enter("loading", SHARES["loading"][0], place)
    if load_pipeline is None:
        pipeline, preset = loader.load_pipeline(settings, device, dtype, on_progress)
    else:
        pipeline, preset = load_pipeline(settings, device, dtype)
        pipeline = with_declared_call(pipeline) if is_modular(pipeline) else pipeline
    embeddings = load_embeddings(pipeline, settings.embeddings)
    apply_optimizations(pipeline, settings, device)

    def on_begin(name: str) -> None:
        enter("loading", SHARES["loading"][1], f"{place}: component {name}")

    merged = settings.preset_over(preset)
    added = load_beside(settings, merged, pipeline, device, dtype, on_begin)
    loras = loras_of(settings, pipeline, added, device, own=load_pipeline is None)
    model = ServedModel(pipeline, preset, settings, added, embeddings, loras)
    # before the engine hooks the modules; previews would show what a safety checker removes
    previewer = (
        None if getattr(pipeline, "safety_checker", None) is not None else Previewer.fit(pipeline)
    )
    engine = StepEngine(
        pipeline,
        settings.batching,
        settings.max_rows,
        max_decode_rows=settings.max_decode_rows,
        max_jobs=settings.max_jobs,
        threads=settings.threads,
        cache_bytes=settings.encoder_cache_bytes,
        policy=policy,
        on_step=on_step,
        beside=model.pipelines.modules(),
        loras=loras,
    )
    needed = [name for name in model.fields.needs if name in model.fields.tensors]
    warmed_up = settings.warmup and not needed
    if settings.warmup and needed:
        logger.warning("no warm-up: the shape of %s is that of requests", " and ".join(needed))
    try:
        model.drop_edits(engine)
        if warmed_up:
            size = f"{model.width}x{model.height}"
            enter("warming_up", 0.8, f"first images of {size}, and certificates")
            warm_up(model, engine)
            heap.set_aside()
    except BaseException:
        engine.close()
        raise
    told = str(device), str(dtype).removeprefix("torch.")
    return Loaded(model, engine, previewer, *told, threads, warmed_up)
