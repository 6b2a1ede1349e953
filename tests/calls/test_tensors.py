"""Files of safetensors that requests send as tensors: what is read, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save

from stepweave.calls import (
    Bounds,
    SentTensor,
    WorkLimits,
    described,
    fields_of,
    read_tensor,
)
from stepweave.calls.tensors import bounds_of_tensor
from stepweave.errors import InvalidRequestError

LIMITS = WorkLimits(steps=50, images=4, side=1024, pixels=1024 * 1024, characters=1000)
BOUNDS = Bounds(-1000, 1000)


def text_of(*tensors: torch.Tensor) -> str:
    file = save({str(i): tensor for i, tensor in enumerate(tensors)})
    return base64.b64encode(file).decode()


def read(tensor: torch.Tensor, name: str = "prompt_embeds", bounds: Bounds = BOUNDS) -> SentTensor:
    return read_tensor(name, text_of(tensor), bounds)


def refused(value: Any, name: str = "prompt_embeds", bounds: Bounds = BOUNDS) -> str:
    text = text_of(value) if isinstance(value, torch.Tensor) else value
    with pytest.raises(InvalidRequestError) as caught:
        read_tensor(name, text, bounds)
    assert caught.value.param == name and caught.value.message.startswith(f"{name}: ")
    return caught.value.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_tensor_is_read_in_its_own_type(dtype: torch.dtype) -> None:
    tensor = torch.randn(1, 3, 4).to(dtype)
    sent = read(tensor)
    assert torch.equal(sent.tensor, tensor) and sent.tensor.dtype == dtype
    assert sent.shape == (1, 3, 4)
    passed = sent.passed("cpu", torch.float32)
    assert passed.dtype == torch.float32 and torch.equal(passed, tensor.float())
    passed.zero_()
    assert torch.equal(sent.tensor, tensor), "each call has a copy of its own"


def test_a_data_url_is_the_same_as_base64() -> None:
    text = text_of(torch.ones(1, 2))
    for url in (text, f"data:application/octet-stream;base64,{text}"):
        sent = read_tensor("prompt_embeds", url, BOUNDS)
        digest = hashlib.sha256(base64.b64decode(text)).hexdigest()
        assert str(sent) == f"float32 [1, 2] sha256:{digest}" and repr(sent) == "float32 [1, 2]"


def test_a_pipeline_that_takes_a_list_gets_one() -> None:
    sent = read_tensor("prompt_embeds", text_of(torch.ones(3, 2)), BOUNDS, listed=True)
    [passed] = sent.passed("cpu", torch.float32)
    assert torch.equal(passed, torch.ones(3, 2))


def test_masks_are_flags_or_numbers_and_ids_are_whole() -> None:
    flags = torch.tensor([[True, False]])
    for mask in (flags, flags.long(), flags.float()):
        sent = read(mask, "prompt_attention_mask", Bounds(0, 1))
        assert torch.equal(
            sent.passed("cpu", torch.float16), mask.half() if mask.is_floating_point() else mask
        )
    assert read(flags.long(), "prior_token_ids", Bounds(0, 1)).tensor.dtype == torch.int64
    assert "its type is F32; it must be I64, I32" in refused(flags.float(), "prior_token_ids")
    assert "its type is I64; it must be F32" in refused(flags.long())


def test_a_flag_that_is_neither_0_nor_1_is_refused() -> None:
    file = bytearray(save({"mask": torch.tensor([True, False])}))
    file[-1] = 2
    text = base64.b64encode(file).decode()
    assert "they must be from 0 to 1" in refused(text, "prompt_attention_mask", Bounds(0, 1))


def arrays() -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3, np.float32))
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (7, "in base64 or as a data URL"),
        ("no base64!", "in base64 or as a data URL"),
        ("http://elsewhere/file.safetensors", "in base64 or as a data URL"),
        ("", "no file of safetensors"),
        (base64.b64encode(pickle.dumps(torch.ones(2))).decode(), "no file of safetensors"),
        (arrays(), "no file of safetensors"),
        (base64.b64encode(save({"a": torch.ones(9)})[:-4]).decode(), "no file of safetensors"),
        (base64.b64encode(b"\xff" * 64).decode(), "with a header of at most 65536 bytes"),
        (text_of(*[torch.ones(0)] * 2000), "with a header of at most 65536 bytes"),
        (text_of(), "has 0 tensors; send one with exactly 1"),
        (text_of(torch.ones(1), torch.ones(1)), "has 2 tensors; send one with exactly 1"),
        (torch.ones(()), "its shape is []; the limit is 1 to 6 dimensions"),
        (torch.ones(1, 0), "its shape is [1, 0]; the limit is 1 to 6 dimensions and 1 to 16777216"),
        (torch.ones(1, 1, 1, 1, 1, 1, 1), "the limit is 1 to 6 dimensions"),
        (torch.ones(2).to(torch.float8_e4m3fn), "its type is F8_E4M3; it must be F32, F16"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
        (torch.tensor([float("-inf")]), "NaN or infinite"),
        (torch.tensor([-1.0, 1001.0]), "from -1 to 1001; they must be from -1000 to 1000"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(value: Any, told: str) -> None:
    assert told in refused(value)


def test_more_elements_than_any_model_takes_are_refused() -> None:
    assert "the limit is" in refused(torch.zeros(2**24 + 1, dtype=torch.float16))


def test_the_bounds_are_those_of_the_preset_the_table_or_the_type() -> None:
    assert bounds_of_tensor("prior_token_ids", None, {}) is None, "an index beyond breaks a GPU"
    assert bounds_of_tensor("prior_token_ids", None, {"prior_token_ids": 32}) == Bounds(0, 31)
    assert bounds_of_tensor("prior_token_ids", [0, 7], {}) == Bounds(0, 7)
    assert bounds_of_tensor("negative_prompt_embeds_mask_2", None, {}) == Bounds(0, 1)
    found = bounds_of_tensor("prompt_embeds", None, {})
    assert found is not None
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.tensor(found.most).to(dtype).isfinite()


def test_the_tensors_of_a_model_and_which_stand_for_its_prompt() -> None:
    fields = fields_of([described(diffusers.StableDiffusionXLPipeline)], {}, {}, LIMITS)
    assert set(fields.tensors) == {
        "latents", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    }  # fmt: skip
    assert fields.for_prompt == ("prompt_embeds",)
    hunyuan = fields_of([described(diffusers.HunyuanImagePipeline)], {}, {}, LIMITS)
    assert hunyuan.for_prompt == ("prompt_embeds", "prompt_embeds_2")
    glm = [described(diffusers.GlmImagePipeline)]
    assert "prior_token_ids" not in fields_of(glm, {}, {}, LIMITS).tensors
    without = fields_of(glm, {}, {"prompt_embeds": False}, LIMITS)
    assert "prompt_embeds" not in without.tensors and without.for_prompt == ()


def test_a_pipeline_that_needs_tensors_is_given_its_image_once() -> None:
    assert not described(diffusers.KandinskyV22Img2ImgPipeline).draws_for_images
    assert described(diffusers.StableDiffusionImg2ImgPipeline).draws_for_images
