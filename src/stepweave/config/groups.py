"""The groups of settings, in which `stepweave serve --help` and the documentation list them."""

from __future__ import annotations

from stepweave.config.settings import OPTIMIZATIONS

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        "model",
        "revision",
        "variant",
        "config_from",
        "model_names",
        "preset",
        "components",
        "embeddings",
        "loras",
        "lora_bytes",
    ),
    "Device and weights": ("device", "dtype", *OPTIMIZATIONS, "cpu_threads"),
    "Batching": (
        "batching",
        "max_rows",
        "max_decode_rows",
        "max_jobs",
        "threads",
        "encoder_cache_bytes",
    ),
    "Queue and connections": ("max_queue", "max_wait", "max_connections"),
    "Limits of a request": (
        "max_images",
        "max_steps",
        "max_pixels",
        "max_input_pixels",
        "max_prompt_characters",
        "max_body_bytes",
        "max_upload_bytes",
    ),
    "Answers": ("response_format", "flagged_images", "base_url"),
    "Access": ("api_keys", "api_keys_file", "trusted_hosts", "trust_forwarded", "cors_origins"),
    "Stored jobs and images": ("state_dir", "keep_seconds", "keep_bytes", "keep_jobs"),
    "Start and stop": ("warmup", "exit_on_failure", "drain_notice", "grace", "stuck_seconds"),
}
