"""The kinds of requests that a model may serve."""

from __future__ import annotations

TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINTING = "text_to_image", "image_to_image", "inpainting"
