"""The server's settings: one object, read once from the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError, from_json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from stepweave.config.components import ComponentsValue
from stepweave.config.engine import Mode
from stepweave.config.loras import LorasValue
from stepweave.config.preset import SETTING, Preset
from stepweave.config.values import Clients, ModelNames, Names, PresetValue, Quantization
from stepweave.errors import ConfigError, did_you_mean, shown
from stepweave.parameters import ResponseFormat

PREFIX = "STEPWEAVE_"
_PACKAGE = Path(__file__).resolve().parents[1]
# in a wheel; in the repository it has a place of its own
_AS_DATA = _PACKAGE / "models" / "shapes"
EMBEDDED_MODEL = _AS_DATA if _AS_DATA.is_dir() else _PACKAGE.parents[1] / "models" / "shapes"

# set by Kubernetes in pods beside Services "stepweave" and "stepweave-..." (enableServiceLinks)
_SERVICE_LINK = re.compile(
    r"STEPWEAVE_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)

# settings of earlier versions, ignored with a warning for one release
# read by the command line and by examples, not by the server
_OF_CLIENTS = ("STEPWEAVE_CLIENT_KEY", "STEPWEAVE_URL")
REMOVED = {
    "STEPWEAVE_POLICY": "the server has a single scheduling policy now (docs/scheduling.md). Unset "
    "it; in the library, pass a policy object to StepEngine(policy=...).",
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
    """A setting's value for a message; `...` if it may be a secret."""
    return "..." if re.search("KEY|TOKEN|SECRET|PASSWORD", name.upper()) else shown(value)


SAFETENSORS = ".safetensors"
EXAMPLES = {"base_url": "must be like https://images.example.com or http://10.0.0.1:3000/stepweave"}


def removed_settings() -> list[str]:
    """A warning for each ignored setting in the environment."""
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
        description="Directory or hub id of the pipeline, or a `.safetensors` file of a whole "
        "model; `shapes` is the embedded model.",
    )
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        None, description="Commit of the hub repository, 40 hex digits; needed with a hub id."
    )
    variant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = Field(
        None,
        description="Variant of the weights, such as `fp16`. Unset: files without a variant; if "
        "there are none, the only complete variant.",
    )
    config_from: str | None = Field(
        None,
        min_length=1,
        description="For a model that is a file: the directory of a diffusers pipeline, of which "
        "the configurations, tokenizers and what the file lacks are read. Unset: built-in ones, "
        "for Stable Diffusion 1.5 and XL.",
    )
    model_names: ModelNames = Field(
        (),
        max_length=64,
        description="Comma-separated names of the model that requests may use; answers show "
        "the first. `*` accepts any name without a colon. Unset: the model's own name.",
    )
    preset: PresetValue = Field(
        None,
        description="Defaults for requests, as in `stepweave.json`: a JSON object, or the path of "
        "a file that holds one.",
    )
    components: ComponentsValue = Field(
        {},
        description="ControlNets, adapters for images, refiners, autoencoders beside the model: a "
        "JSON object of directories, or hub ids with commits, by name; or the path of a file with "
        "one.",
    )
    embeddings: str | None = Field(
        None,
        min_length=1,
        description="Directory of textual inversions, `.safetensors` files; a prompt uses one by "
        "its file's name without the ending.",
    )
    loras: LorasValue = Field(
        None,
        description="LoRAs that requests may name: a directory, each of whose `.safetensors` files "
        "and folders is one; and, separated by commas, `NAME=OWNER/REPOSITORY@COMMIT:FILE` of the "
        "hub. They replace the model's own, which are those of its directory `loras`, if it has "
        "one.",
    )
    lora_bytes: int = Field(
        2**30,
        ge=2**20,
        description="Memory for LoRAs, in bytes. What is not in it is read when a request names "
        "it; the one that was not used for longest leaves.",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = Field(
        "auto", description="`auto` (first GPU, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type of the weights; `auto` is bfloat16 (else float16) on a GPU and "
        "float32 on a CPU.",
    )
    quantization: Annotated[Quantization | None, NoDecode] = Field(
        None,
        description="Quantise while loading: a JSON object with `quant_backend`, `quant_kwargs` "
        "and `components_to_quantize`, as in diffusers.",
    )
    offload: Literal["off", "model", "sequential"] = Field(
        "off",
        description="Keep weights in main memory and move them to the GPU when they are used: "
        "`model` moves whole models, `sequential` single layers.",
    )
    channels_last: bool = Field(False, description="Channels-last memory format for convolutions.")
    vae_slicing: bool = Field(False, description="Decode the images of a batch one by one.")
    vae_tiling: bool = Field(False, description="Decode large images in tiles.")
    attention_backend: str | None = Field(
        None,
        min_length=1,
        description="Attention backend of the denoiser, by diffusers' name: `native`, `flash`, "
        "`sage`, ...",
    )
    compile: bool = Field(
        False, description="Compile the denoiser's repeated blocks with torch.compile."
    )
    cpu_threads: int = Field(
        0, ge=0, le=1024, description="Torch's CPU threads; 0 follows the cgroup's CPU quota."
    )
    batching: Mode = Field(
        "step",
        description="`step` batches denoising steps of all jobs, `request` whole calls that differ "
        "only in prompt and seed. `threads` batches nothing and runs jobs in parallel, `off` runs "
        "them one at a time.",
    )
    max_rows: int = Field(
        32,
        ge=1,
        le=4096,
        description="Largest batch of one forward; an image counts 1, with guidance 2. With "
        "`STEPWEAVE_BATCHING=request`, the largest number of images in a batch.",
    )
    max_decode_rows: int = Field(
        4,
        ge=1,
        le=4096,
        description="Largest number of images that the autoencoder decodes together.",
    )
    max_jobs: int = Field(
        64, ge=1, le=4096, description="Concurrent jobs with `STEPWEAVE_BATCHING=step`."
    )
    threads: int = Field(
        4, ge=1, le=64, description="Concurrent jobs with `STEPWEAVE_BATCHING=threads`."
    )
    encoder_cache_bytes: int = Field(
        268_435_456, ge=0, description="Size of the cache of prompt embeddings; 0 turns it off."
    )
    warmup: bool = Field(
        True,
        description="Run short generations, and test whether they can be batched, before the "
        "server is ready.",
    )
    exit_on_failure: bool = Field(
        False,
        description="Exit with status 1 if the model cannot be loaded. Otherwise the process "
        "stays, and its probes report the reason.",
    )
    max_queue: int = Field(
        64,
        ge=0,
        le=100_000,
        description="Requests in flight beyond the first, running or waiting. Further ones are "
        "refused with 429.",
    )
    max_wait: float = Field(
        600,
        gt=0,
        description="Longest predicted wait in seconds; requests that would wait longer are "
        "refused with 429.",
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
        description="Largest width times height of an uploaded image or mask. Images larger than "
        "the model makes are scaled down.",
    )
    response_format: ResponseFormat = Field(
        "b64_json",
        description="How OpenAI's routes return images if a request has no `response_format`.",
    )
    flagged_images: Literal["mark", "refuse"] = Field(
        "mark",
        description="What happens to images that the pipeline's safety checker flags: `mark` "
        "returns them with `flagged`, `refuse` answers 400.",
    )
    max_prompt_characters: int = Field(
        4000, ge=1, le=7000, description="Longest prompt or negative prompt."
    )
    max_body_bytes: int = Field(
        1_048_576, ge=1024, description="Largest request body without an image."
    )
    max_upload_bytes: int = Field(
        33_554_432, ge=1024, description="Largest request body of an edit, which has images."
    )
    max_connections: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="Open connections. A further one replaces an idle one, or is answered 503.",
    )
    api_keys: Clients = Field(
        (),
        repr=False,
        description="Comma-separated API keys; the clients are `key1`, `key2`, ... If set, every "
        "request except health probes must send one. If no key is set here or in a file: no "
        "authentication.",
    )
    api_keys_file: str | None = Field(
        None,
        min_length=1,
        description="File of API keys, one client per line: `name: KEY` or `name: sha256:HEX`, "
        "followed by ` admin` for an administrator. Changes are read without a "
        "restart.",
    )
    base_url: Annotated[str, Field(pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$")] | None = Field(
        None,
        description="First part of image URLs, such as `https://images.example.org`. Unset: the "
        "host that the request names, if `STEPWEAVE_TRUSTED_HOSTS` has it.",
    )
    trusted_hosts: str = Field(
        "localhost,127.0.0.1,[::1]",
        description="Comma-separated host names that may appear in image URLs; `*.example.com`, or "
        "`*` for any.",
    )
    trust_forwarded: bool = Field(
        False,
        description="Trust `X-Forwarded-For`, `-Host`, `-Proto` and `-Prefix`. Only for servers "
        "that clients can reach only through a proxy.",
    )
    cors_origins: Names = Field(
        (),
        description="Comma-separated origins whose pages may call the server (CORS); `*` for any.",
    )
    state_dir: str | None = Field(
        None,
        min_length=1,
        description="Where jobs and images are stored (one server each). Unset: a temporary "
        "directory, deleted at exit.",
    )
    keep_seconds: float = Field(
        3600, gt=0, description="How long finished jobs and stored images are kept, in seconds."
    )
    keep_bytes: int = Field(
        1_073_741_824,
        ge=1_048_576,
        description="Largest total size of stored images; the oldest are deleted first.",
    )
    keep_jobs: int = Field(
        10_000, ge=1, description="Largest number of finished jobs; the oldest are deleted first."
    )
    drain_notice: float = Field(
        6,
        ge=0,
        description="How long new requests are still accepted after `POST /drain`, in seconds, "
        "so that load balancers can notice.",
    )
    grace: float = Field(
        300,
        ge=0,
        description="How long accepted work may run after a drain or SIGTERM, in seconds.",
    )
    stuck_seconds: float = Field(
        600,
        gt=0,
        description="A forward that runs for more seconds than this counts as stuck, and `/livez` "
        "fails. A request also fails if its job has been done for so long, but is not answered.",
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
        given = f"STEPWEAVE_MODEL={shown(self.model)}"
        if self.model_directory() is None and self.model_file() is None:
            if Path(self.model).expanduser().is_file():
                raise ValueError(
                    f"{given} is a file, but not a .safetensors file, the only kind that is read "
                    "(pickles, such as .ckpt, can run code)"
                )
            if self.model.endswith(SAFETENSORS):
                raise ValueError(f"{given} is not an existing file")
            if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.model):
                raise ValueError(
                    f"{given} is neither an existing directory nor a hub id (owner/name), nor a "
                    ".safetensors file"
                )
            if self.revision is None:
                raise ValueError(
                    f"{given} is not an existing directory; if it is a hub id, set "
                    "STEPWEAVE_REVISION to its commit (40 hex digits; the newest is printed by "
                    f"`git ls-remote https://huggingface.co/{self.model} HEAD`)"
                )
        elif self.revision is not None:
            kind = "directory" if self.model_file() is None else "file"
            raise ValueError(
                f"STEPWEAVE_REVISION={shown(self.revision)} is a commit of a hub repository, but "
                f"{given} is a {kind}; unset one of them"
            )
        return self

    @model_validator(mode="after")
    def _fits_a_file_or_a_directory(self) -> Settings:
        if self.model_file() is None:
            if self.config_from is not None:
                raise ValueError(
                    f"STEPWEAVE_CONFIG_FROM={shown(self.config_from)} is for a model that is a "
                    f".safetensors file, but STEPWEAVE_MODEL={shown(self.model)} has its own "
                    "configurations; unset one of them"
                )
            return self
        for name in ("variant", "quantization"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"STEPWEAVE_{name.upper()} is not for a model that is a file; unset it, or "
                    "write the model as a directory with diffusers' `save_pretrained`"
                )
        if self.config_from is not None and not Path(self.config_from).expanduser().is_dir():
            raise ValueError(
                f"STEPWEAVE_CONFIG_FROM={shown(self.config_from)} is not an existing directory"
            )
        return self

    @field_validator("embeddings")
    @classmethod
    def _is_a_directory(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).expanduser().is_dir():
            raise PydanticCustomError("directory", "it is not an existing directory")
        return value

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
        """A model's own preset merged with the setting, which has precedence."""
        return preset if self.preset is None else self.preset.over(preset)

    def model_directory(self) -> Path | None:
        """The model's local directory, or None for a hub id or a file."""
        if self.model == "shapes":
            return EMBEDDED_MODEL
        path = Path(self.model).expanduser()
        return path if path.is_dir() else None

    def model_file(self) -> Path | None:
        """The safetensors file of a model that is one file, else None."""
        path = Path(self.model).expanduser()
        named = self.model != "shapes" and path.suffix == SAFETENSORS
        return path if named and path.is_file() else None

    def is_local(self) -> bool:
        """Whether the model is a directory or a file, and nothing is downloaded."""
        return self.model_directory() is not None or self.model_file() is not None

    def model_name(self) -> str:
        """For answers: the hub id, or the name of the directory or file without its path (and, of
        a file, without its ending)."""
        directory, file = self.model_directory(), self.model_file()
        if directory is not None:
            return directory.resolve().name
        return self.model if file is None else file.stem

    def local_folder(self) -> Path | None:
        """The directory of the model's files, which messages do not show; None for a hub id."""
        file = self.model_file()
        return self.model_directory() if file is None else file.parent

    def optimizations(self) -> dict[str, Any]:
        """The settings passed to diffusers and torch, by name."""
        return self.model_dump(include=set(OPTIMIZATIONS))

    @classmethod
    def load(cls) -> Settings:
        """Read the settings. Raises ConfigError with name and value of each wrong one."""
        names = {f"{PREFIX}{field.upper()}" for field in cls.model_fields}
        problems = []
        for name, value in sorted(os.environ.items()):
            upper = name.upper()
            known = upper in (*names, *REMOVED, *_OF_CLIENTS) or _SERVICE_LINK.fullmatch(name)
            if upper.startswith(PREFIX) and not known:
                hint = did_you_mean(upper, names)
                problems.append(f"{name}={_given(name, value)}: there is no such setting{hint}")
        try:
            settings = cls()
        except ValidationError as error:
            for item in error.errors():
                message = item["msg"].removeprefix("Value error, ")
                if item["loc"]:
                    field, *members = map(str, item["loc"])
                    if item["type"] == "string_pattern_mismatch":
                        allowed = EXAMPLES.get(field) or cls.model_fields[field].description
                        message = allowed or message
                    name = ".".join([f"{PREFIX}{field.upper()}", *members])
                    message = f"{name}={_given(name, item['input'])}: {message}"
                problems.append(message)
        if problems:
            raise ConfigError("; ".join(problems))
        return settings
