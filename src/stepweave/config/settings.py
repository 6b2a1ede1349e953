"""The server's settings: one object, read once from the environment."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError, from_json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from stepweave.config.preset import SETTING, Preset
from stepweave.config.values import Clients, ModelNames, Names, PresetValue, Quantization
from stepweave.errors import ConfigError, shown

PREFIX = "STEPWEAVE_"
EMBEDDED_MODEL = Path(__file__).resolve().parents[3] / "models" / "shapes"

# What Kubernetes puts into every pod of a namespace that has Services called "stepweave" or
# "stepweave-..." (enableServiceLinks).
_SERVICE_LINK = re.compile(
    r"STEPWEAVE_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)


# Settings of earlier versions: they are ignored for one release, with a warning.
REMOVED = {
    "STEPWEAVE_POLICY": "all servers run steps in the same order now (docs/scheduling.md). Unset "
    "it; as a library, pass StepEngine(policy=...) an object.",
}

OPTIMIZATIONS = (
    "quantization",
    "offload",
    "channels_last",
    "vae_slicing",
    "vae_tiling",
    "attention_backend",
    "compile",
)


def _given(name: str, value: object) -> str:
    """A setting's value as a message repeats it; nothing that may be a secret."""
    return "..." if re.search("KEY|TOKEN|SECRET|PASSWORD", name.upper()) else shown(value)


EXAMPLES = {"base_url": "must be as https://images.example.com or http://10.0.0.1:3000/stepweave"}


def removed_settings() -> list[str]:
    """For each setting of the environment that is ignored: what to do instead."""
    return [
        f"{name} is ignored: {REMOVED[name.upper()]}"
        for name in sorted(os.environ)
        if name.upper() in REMOVED and os.environ[name]
    ]


class Settings(BaseSettings):
    """Settings of one server process, from environment variables with the prefix `STEPWEAVE_`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    model: str = Field(
        "shapes",
        min_length=1,
        description="Directory or hub id of the pipeline; `shapes` is embedded.",
    )
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        None, description="Commit of the hub repository, 40 hex digits; needed with a hub id."
    )
    variant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = Field(
        None,
        description="Variant of the weights, as `fp16`; if unset, files without one, or else the "
        "one variant that is whole.",
    )
    model_names: ModelNames = Field(
        (),
        max_length=64,
        description="Names, comma-separated, that requests may call the model by: answers have the "
        "first, `*` takes any without a colon. If unset, the model's own.",
    )
    preset: PresetValue = Field(
        None,
        description="Defaults of requests, as in `stepweave.json`: a JSON object, or the path of a "
        "file with one.",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = Field(
        "auto", description="`auto` (first GPU, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of the weights; `auto` is bfloat16 (else float16) on a GPU and float32 on "
        "a CPU.",
    )
    quantization: Annotated[Quantization | None, NoDecode] = Field(
        None,
        description="Quantise while loading: a JSON object with `quant_backend`, `quant_kwargs` "
        "and `components_to_quantize`, as in diffusers.",
    )
    offload: Literal["off", "model", "sequential"] = Field(
        "off",
        description="Keep weights in main memory and move them to the GPU for use: `model` whole "
        "models, `sequential` layers.",
    )
    channels_last: bool = Field(False, description="Channels-last memory format for convolutions.")
    vae_slicing: bool = Field(False, description="Decode the images of a batch one by one.")
    vae_tiling: bool = Field(False, description="Decode large images in tiles.")
    attention_backend: str | None = Field(
        None,
        min_length=1,
        description="Of the denoiser, by diffusers' name: `native`, `flash`, `sage`, ...",
    )
    compile: bool = Field(
        False, description="Compile the denoiser's repeated blocks with torch.compile."
    )
    cpu_threads: int = Field(
        0, ge=0, le=1024, description="Torch's CPU threads; 0 follows the cgroup's CPU quota."
    )
    batching: Literal["off", "threads", "request", "step"] = Field(
        "step",
        description="What jobs share: `step` denoising steps, `request` whole calls that differ in "
        "prompt and seed only, `threads` nothing, side by side, `off` nothing, one at "
        "a time.",
    )
    max_rows: int = Field(
        32,
        ge=1,
        le=4096,
        description="Rows of a shared step (images of a shared call with `request`); guidance "
        "takes two.",
    )
    max_decode_rows: int = Field(
        4, ge=1, le=4096, description="Images that the autoencoder decodes together."
    )
    max_jobs: int = Field(
        64, ge=1, le=4096, description="Jobs that run at a time with `STEPWEAVE_BATCHING=step`."
    )
    threads: int = Field(
        4, ge=1, le=64, description="Jobs that run at a time with `STEPWEAVE_BATCHING=threads`."
    )
    encoder_cache_bytes: int = Field(
        268_435_456, ge=0, description="Bound of remembered prompt encodings; 0 remembers none."
    )
    warmup: bool = Field(
        True, description="Run and certify short generations before the server turns ready."
    )
    exit_on_failure: bool = Field(
        False,
        description="Exit with status 1 if the model cannot be loaded; else the probes go on to "
        "tell the reason.",
    )
    max_queue: int = Field(
        64,
        ge=0,
        le=100_000,
        description="Requests that may wait for the one being served, or share its steps; one more "
        "is refused with 429.",
    )
    max_wait: float = Field(
        600,
        gt=0,
        description="Seconds that a request may have to wait, as predicted; else it is refused "
        "with 429.",
    )
    max_images: int = Field(8, ge=1, le=64, description="Largest `n` of a request.")
    max_steps: int = Field(
        200, ge=1, le=10_000, description="Largest `num_inference_steps` of a request."
    )
    max_pixels: int = Field(
        2048 * 2048, ge=64 * 64, description="Largest width times height of an image."
    )
    max_input_pixels: int = Field(
        8192 * 8192,
        ge=64 * 64,
        le=178_956_970,  # beyond, Pillow takes it for a bomb
        description="Largest width times height of an image, or mask, that is sent. Larger ones "
        "than the model makes are scaled.",
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json",
        description="How images are returned to requests for OpenAI's routes that do not say.",
    )
    flagged_images: Literal["mark", "refuse"] = Field(
        "mark",
        description="Images that the pipeline's safety checker flags: `mark` returns them with "
        "`flagged`, `refuse` answers 400.",
    )
    max_prompt_characters: int = Field(
        4000, ge=1, le=7000, description="Longest prompt or negative prompt."
    )
    max_body_bytes: int = Field(
        1_048_576, ge=1024, description="Largest body of a request without an image."
    )
    max_upload_bytes: int = Field(
        33_554_432, ge=1024, description="Largest body of a request with images, of an edit."
    )
    max_connections: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="Connections that may be open; one more takes an idle one's place, or gets "
        "503.",
    )
    api_keys: Clients = Field(
        (),
        repr=False,
        description="Comma-separated API keys, of the clients `key1`, `key2`, ... If set, every "
        "request except health probes must send one. With neither this nor a file of "
        "keys: no authentication.",
    )
    api_keys_file: str | None = Field(
        None,
        min_length=1,
        description="File of API keys, one client a line: `name: KEY` or `name: sha256:HEX`, with "
        "` admin` after it for an administrator. Read again when it changes.",
    )
    base_url: Annotated[str, Field(pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$")] | None = Field(
        None,
        description="What the URLs of images begin with; if unset, the host that a request "
        "names, if it is trusted.",
    )
    trusted_hosts: str = Field(
        "localhost,127.0.0.1,[::1]",
        description="Hosts, comma-separated, that requests may name for the URLs of images; "
        "`*.example.com`, or `*` for any.",
    )
    trust_forwarded: bool = Field(
        False,
        description="Believe `X-Forwarded-For`, `-Host`, `-Proto` and `-Prefix`; for servers that "
        "only a proxy reaches.",
    )
    cors_origins: Names = Field(
        (), description="Origins, comma-separated, whose pages may call the server; `*` for any."
    )
    state_dir: str | None = Field(
        None,
        min_length=1,
        description="Directory of jobs and images, for one server; if unset, one that ends "
        "with it.",
    )
    keep_seconds: float = Field(
        3600, gt=0, description="Seconds that finished jobs and stored images are kept."
    )
    keep_bytes: int = Field(
        1_073_741_824, ge=1_048_576, description="Bound of stored images; the oldest go first."
    )
    keep_jobs: int = Field(
        10_000, ge=1, description="Bound of finished jobs that are kept; the oldest go first."
    )
    drain_notice: float = Field(
        6,
        ge=0,
        description="Seconds after `POST /drain` in which work is still taken, until load "
        "balancers have heard of it.",
    )
    grace: float = Field(
        300,
        ge=0,
        description="Seconds after a drain, or at the end, that what runs may take to finish.",
    )
    stuck_seconds: float = Field(
        600,
        gt=0,
        description="Seconds of one forward after which the engine counts as stuck, and `/livez` "
        "fails; and seconds after which a request fails whose job is done but not "
        "answered.",
    )

    @field_validator("quantization", mode="before")
    @classmethod
    def _read_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return from_json(value)
        except ValueError as error:
            raise PydanticCustomError(
                "json", "not JSON: {reason}", {"reason": str(error)}
            ) from None

    @model_validator(mode="after")
    def _model_can_be_found(self) -> Settings:
        if self.model_directory() is None:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.model) or self.model.startswith(
                (".", "/")
            ):
                raise ValueError(
                    f"STEPWEAVE_MODEL={shown(self.model)} is no directory here and no hub id "
                    f"(owner/name)"
                )
            if self.revision is None:
                raise ValueError(
                    f"STEPWEAVE_MODEL={shown(self.model)} is no directory here; if it is a hub id, "
                    "STEPWEAVE_REVISION must pin its commit (40 hex digits)"
                )
        elif self.revision is not None:
            raise ValueError(
                f"STEPWEAVE_REVISION={shown(self.revision)} pins a hub commit, but "
                f"STEPWEAVE_MODEL={shown(self.model)} is a directory"
            )
        return self

    @model_validator(mode="after")
    def _preset_is_within_limits(self) -> Settings:
        preset = self.preset or Preset()
        steps, pixels = preset.num_inference_steps or 0, (preset.width or 8) * (preset.height or 8)
        if steps > self.max_steps:
            raise ValueError(
                f"{SETTING}: num_inference_steps is {steps}; STEPWEAVE_MAX_STEPS is "
                f"{self.max_steps}"
            )
        if pixels > self.max_pixels:
            size = " and ".join(
                f"{name} is {value}"
                for name, value in preset.given().items()
                if name in ("width", "height")
            )
            raise ValueError(f"{SETTING}: {size}; STEPWEAVE_MAX_PIXELS is {self.max_pixels}")
        return self

    def preset_over(self, preset: Preset) -> Preset:
        """What a model's own preset and the setting, which has precedence, say."""
        return preset if self.preset is None else self.preset.over(preset)

    def model_directory(self) -> Path | None:
        """The model's local directory, or None for a hub id."""
        if self.model == "shapes":
            return EMBEDDED_MODEL
        path = Path(self.model).expanduser()
        return path if path.is_dir() else None

    def model_name(self) -> str:
        """The model as answers may name it, without the path of its directory."""
        directory = self.model_directory()
        return directory.resolve().name if directory else self.model

    def optimizations(self) -> dict[str, Any]:
        """The settings that are passed through to diffusers and torch, by name."""
        return self.model_dump(include=set(OPTIMIZATIONS))

    @classmethod
    def load(cls) -> Settings:
        """Read the settings, or raise ConfigError with the name and value of each one that is
        wrong."""
        names = {f"{PREFIX}{field.upper()}" for field in cls.model_fields}
        problems = []
        for name in sorted(os.environ):
            if (
                name.upper().startswith(PREFIX)
                and name.upper() not in names
                and name.upper() not in REMOVED
                and not _SERVICE_LINK.fullmatch(name)
            ):
                close = difflib.get_close_matches(name.upper(), names, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                problems.append(
                    f"{name}={_given(name, os.environ[name])}: there is no such setting{hint}"
                )
        try:
            settings = cls()
        except ValidationError as error:
            for item in error.errors():
                message = item["msg"].removeprefix("Value error, ")
                if item["loc"]:
                    if item["type"] == "string_pattern_mismatch":
                        field = str(item["loc"][0])
                        message = (
                            EXAMPLES.get(field) or cls.model_fields[field].description or message
                        )
                    name = ".".join(
                        [f"{PREFIX}{str(item['loc'][0]).upper()}", *map(str, item["loc"][1:])]
                    )
                    message = f"{name}={_given(name, item['input'])}: {message}"
                problems.append(message)
        if problems:
            raise ConfigError("; ".join(problems))
        return settings
