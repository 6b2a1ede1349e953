"""Warnings about values that change nothing."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from stepweave.adapters.embeddings import Embedding
from stepweave.calls import described
from stepweave.errors import shown
from stepweave.parameters import Parameters
from stepweave.serving.call import default_of

# `(word:1.3)`, as some programs weigh the words of a prompt
_WEIGHT = re.compile(r"\([^()]{1,200}:\s*\d+(?:\.\d+)?\s*\)")
# `<lora:NAME:0.5>`, as some programs name LoRAs in a prompt
_LORA = re.compile(r"<\s*(?:lora|lyco)\s*:\s*([^<>:]{1,200}?)\s*(?::[^<>]{0,200})?>", re.IGNORECASE)


def warnings_of(
    pipeline: Any, defaults: dict[str, Any], parameters: Parameters, prompt: str | None
) -> Iterator[str]:
    """A warning for each value of a request that has no effect; `prompt` is as it was sent, and
    `defaults` are a preset's arguments of the call."""
    call = described(pipeline)
    if prompt and "prompt" not in call.takes:
        yield f"prompt: it has no effect: {call.pipeline} takes none."
    texts = {"prompt": parameters.prompt, "negative_prompt": parameters.negative_prompt}
    for name, text in {**texts, **parameters.arguments}.items():
        found = _WEIGHT.search(text) if isinstance(text, str) else None
        if found is not None:
            yield (
                f"{name}: {shown(found[0])} is passed to the model as it is written; weights of "
                "words have no meaning here."
            )
        named = _LORA.search(text) if isinstance(text, str) else None
        if named is not None:
            yield (
                f"{name}: {shown(named[0])} is passed to the model as it is written; LoRAs are "
                f"named in the field lora, as {shown(named[1])} or with a scale, NAME:SCALE."
            )
    name = "true_cfg_scale" if "true_cfg_scale" in call.takes else "guidance_scale"
    asked = parameters.arguments.get(name)
    scale = asked if asked is not None else defaults.get(name)
    if name == "guidance_scale":
        scale = parameters.guidance_scale
    elif scale is None:
        scale = default_of(pipeline, name)
    if scale is None:
        return
    off = scale <= _least_guidance(type(pipeline))  # type: ignore[arg-type]
    if parameters.negative_prompt is not None and off:
        yield f"negative_prompt: it has no effect without guidance; {name} is {scale:g}."
    if parameters.guidance_rescale and off:
        yield f"guidance_rescale: it has no effect without guidance; {name} is {scale:g}."
    if name == "true_cfg_scale" and asked is not None and not off:
        if parameters.negative_prompt is None and "negative_prompt" in call.takes:
            yield f"{name}: it has no effect without negative_prompt, which may be a space."


def spelling_warnings(embeddings: Iterable[Embedding], parameters: Parameters) -> Iterator[str]:
    """A warning for each textual inversion that a text names in other capital or small letters."""
    texts = {"prompt": parameters.prompt, "negative_prompt": parameters.negative_prompt}
    for name, text in {**texts, **parameters.arguments}.items():
        for embedding in embeddings if isinstance(text, str) else ():
            token = embedding.token
            if token not in text and token.lower() in text.lower():
                yield (
                    f"{name}: the textual inversion {shown(token)} is not used, since the text "
                    "has it in other capital or small letters."
                )


@functools.cache
def _least_guidance(pipeline: type[Any]) -> float:
    """The scale up to which guidance is off: 1, or 0 for some pipelines."""
    own = getattr(pipeline, "do_classifier_free_guidance", None)
    try:
        code = inspect.getsource(own.fget) if isinstance(own, property) and own.fget else ""
    except (OSError, TypeError):
        code = ""
    return 0.0 if re.search(r"scale > 0\b(?!\.[1-9])", code) else 1.0
