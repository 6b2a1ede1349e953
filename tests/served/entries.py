"""Which entries of tests/pipelines are served, and which are not, by name, with the reason."""

from __future__ import annotations

from tests.pipelines.catalog import entries
from tests.pipelines.registry import Entry

# modules whose pipelines make no images
NOT_IMAGES = {
    "unets_video": "it makes videos",
    "video": "it makes videos",
    "video_ltx2": "it makes videos",
    "video_more": "it makes videos",
    "audio": "it makes sound",
}
_REASONS: dict[str, tuple[str, ...]] = {
    "it makes sound": ("dance_diffusion",),
    "its results are embeddings": (
        "kandinsky_prior",
        "kandinsky_v22_prior",
        "kandinsky_v22_prior_emb2emb",
        "stable_cascade_prior",
        "stable_cascade_prior_images",
        "wuerstchen_prior_stage",
    ),
    "it needs control: ControlNet, ControlNet-XS, T2I-Adapter or another control image": (
        "cogview4_control",
        "flux_control",
        "flux_control_img2img",
        "flux_control_inpaint",
        "flux_control_net_img2img",
        "flux_control_net_inpaint",
        "flux_control_net_text",
        "flux_control_net_union_text",
        "hunyuan_dit_control_net",
        "kandinsky_v22_controlnet_img2img",
        "kandinsky_v22_controlnet_text",
        "qwen_image_control_net_inpaint",
        "qwen_image_control_net_text",
        "sana_control_net",
        "stable_diffusion_3_control_net_inpainting",
        "stable_diffusion_3_control_net_text",
        "stable_diffusion_adapter_text",
        "stable_diffusion_control_net_guess",
        "stable_diffusion_control_net_img2img",
        "stable_diffusion_control_net_inpaint",
        "stable_diffusion_control_net_interval",
        "stable_diffusion_control_net_pag_inpaint",
        "stable_diffusion_control_net_pag_text",
        "stable_diffusion_control_net_scales",
        "stable_diffusion_control_net_text",
        "stable_diffusion_control_net_xs_text",
        "stable_diffusion_multi_control_net_text",
        "stable_diffusion_xl_adapter_text",
        "stable_diffusion_xl_control_net_img2img",
        "stable_diffusion_xl_control_net_inpaint",
        "stable_diffusion_xl_control_net_pag_img2img",
        "stable_diffusion_xl_control_net_pag_text",
        "stable_diffusion_xl_control_net_text",
        "stable_diffusion_xl_control_net_union_img2img",
        "stable_diffusion_xl_control_net_union_inpaint",
        "stable_diffusion_xl_control_net_union_text",
        "stable_diffusion_xl_control_net_xs_text",
        "z_image_control_net_inpaint",
        "z_image_control_net_text",
    ),
    "it needs an image adapter: IP-Adapter or Redux": (
        "flux_prior_redux",
        "stable_diffusion_ip_adapter_text",
        "stable_diffusion_xl_ip_adapter_text",
    ),
}
NOT_SERVED = {name: reason for reason, names in _REASONS.items() for name in names}


def excluded() -> dict[str, str]:
    """Why an entry is not asked, by name."""
    return {
        name: reason
        for name, entry in entries().items()
        if (reason := NOT_SERVED.get(name) or NOT_IMAGES.get(entry.module))
    }


def served() -> dict[str, Entry]:
    """The entries that are asked, by name."""
    others = excluded()
    return {name: entry for name, entry in entries().items() if name not in others}
