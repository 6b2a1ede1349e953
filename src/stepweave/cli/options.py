"""Options made from the settings: a flag, an environment variable and an entry of a file are one
setting, of which the flag has precedence over the variable, and the variable over the file."""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import yaml
from pydantic.fields import FieldInfo

from stepweave.cli.failures import Usage
from stepweave.config import GROUPS, PREFIX, Settings
from stepweave.errors import ConfigError, did_you_mean, shown

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

HOST, PORT = "host", "port"  # of `serve`: BentoML's, which are no settings of the server
ADDRESS = {HOST: "BENTOML_HOST", PORT: "BENTOML_PORT"}
_VARIABLE = re.compile(rf"\b{PREFIX}[A-Z_]+\b")


class Grouped(click.Command):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                listed.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for group in ("Options", *GROUPS):
            if group in listed:
                with formatter.section(group):
                    formatter.write_dl(listed[group])


class SettingOption(click.Option):
    """The option of one setting, whose value is passed on as text."""

    def __init__(self, name: str, field: FieldInfo, group: str, default: Any) -> None:
        flag = "--" + name.replace("_", "-")
        about = field.description or ""
        said = "" if default in (None, ()) else f"; default {str(default).lower()}"
        help_ = f"{about} [{PREFIX}{name.upper()}{said}]"
        if field.annotation is bool:
            super().__init__([f"{flag}/--no-{flag[2:]}", name], default=None, help=help_)
        elif choices := _choices(field):
            super().__init__([flag, name], type=click.Choice(choices), help=help_)
        else:
            super().__init__([flag, name], metavar=_metavar(field), help=help_)
        self.group = group


def setting_options(
    *, without: tuple[str, ...] = (), **defaults: Any
) -> Callable[[FunctionT], FunctionT]:
    """Add an option for each setting to a command, which gets them as keyword arguments, and the
    option `--config`. `defaults` are those that the command sets itself, for the help."""

    def add(function: FunctionT) -> FunctionT:
        options: list[click.Option] = [
            SettingOption(name, field, group, defaults.get(name, field.default))
            for group, names in GROUPS.items()
            for name, field in ((name, Settings.model_fields[name]) for name in names)
            if name not in without
        ]
        options.insert(
            0,
            click.Option(
                ["--config"],
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="YAML file of settings, named as the options: `max_rows: 16`.",
            ),
        )
        parameters: list[click.Parameter] = getattr(function, "__click_params__", [])
        function.__click_params__ = [*reversed(options), *parameters]  # type: ignore[attr-defined]
        return function

    return add


@dataclass(frozen=True)
class Given:
    """A setting that was given: its value as text, and what gave it, for messages."""

    text: str
    source: str


def given_settings(flags: Mapping[str, Any], config: Path | None) -> dict[str, Given]:
    """The settings of flags, environment and file, by name. Raises Usage for a wrong file."""
    given: dict[str, Given] = {}
    if config is not None:
        for name, value in _entries(config):
            given[name] = Given(_text(value), f"{name} in {config}")
    environment = {name.upper(): value for name, value in os.environ.items()}
    for name, variable in _variables():
        value = environment.get(variable, "")
        if value:
            given[name] = Given(value, variable)
    for name, value in flags.items():
        if value is not None:
            source = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            given[name] = Given(_text(value), source)
    return given


def export(given: Mapping[str, Given]) -> Settings:
    """Set the environment variables of the settings, and read them as a server does. Raises Usage,
    which names what gave the wrong value."""
    variables = dict(_variables())
    for name, one in given.items():
        os.environ[variables[name]] = one.text
    try:
        return Settings.load()
    except ConfigError as error:
        sources = {variables[name]: one.source for name, one in given.items()}
        message = _VARIABLE.sub(lambda found: sources.get(found[0], found[0]), error.message)
        raise Usage(message) from None


def _variables() -> Iterator[tuple[str, str]]:
    yield from ((name, PREFIX + name.upper()) for name in Settings.model_fields)
    yield from ADDRESS.items()


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a file of settings."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeError) as error:
        raise Usage(f"--config: {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        # without the lines around it, which may hold keys
        problem = getattr(error, "problem", None) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise Usage(f"--config: {path} is not YAML: {problem}{place}") from None
    if content is None:
        return
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise Usage(f"--config: {path} holds a {kind}; it must be like `max_rows: 16`")
    known = dict(_variables())
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            hint = did_you_mean(name, known)
            raise Usage(f"--config: {path}: there is no setting {shown(key)}{hint}")
        if value is not None and value != []:
            yield name, value


def _text(value: Any) -> str:
    """A value as an environment variable has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return str(value)


def _choices(field: FieldInfo) -> list[str]:
    return [str(item) for item in get_args(field.annotation)] if _is_literal(field) else []


def _is_literal(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal


def _metavar(field: FieldInfo) -> str:
    kinds = get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
    names = {int: "N", float: "SECONDS" if "seconds" in (field.description or "") else "NUMBER"}
    return next((names[kind] for kind in kinds if kind in names), "TEXT")


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType)
