"""Describes an exception in one line for clients, without paths of the server; and codes of why
calls run alone."""

from __future__ import annotations

import dis
import os
import re
from pathlib import Path
from typing import Literal

# of calls that share no forward, or of jobs that take turns
UnsharedReason = Literal[
    "state",  # the module keeps state of a call, or the pipeline changes the module
    "turns",  # a hook keeps the state of a call
    "callback",  # the job's own code has changed the module
    "cast",  # the pipeline casts the module for a while
    "failed",  # merged and alone differ
    "random",  # it draws random numbers
    "writes_arguments",
    "must_be_equal",  # calls differ in some argument
    "too_alike",  # the compared calls cannot be distinguished
    "not_finite",
    "not_comparable",  # arguments or results without rows
    "reproducible",  # the job has requested it
    "error",
]
UnsharedNote = tuple[UnsharedReason, str]  # a code and a text

LONGEST = 400  # characters of a reason

# an absolute path with at least one folder, but not a URL
_PATH = re.compile(
    r"(?<![\w./~-])~?(?:/(?!/)[\w.@+%=,-]+)+/([\w.@+%=,-]+)|\b[A-Za-z]:(?:\\[\w.@+%=,-]+)+\\([\w.@+%=,-]+)"
)


def reason_of(error: BaseException, folder: Path | None = None) -> str:
    """An exception's message in one line of at most `LONGEST` characters, or its class if empty.

    Paths in `folder`, a model's directory, become relative to it; other absolute paths are cut to
    their last name.
    """
    if isinstance(error, OSError) and error.strerror:
        name = public(str(error.filename), folder) if error.filename else ""
        text = f"{name}: {error.strerror}" if name else error.strerror
    else:
        text = public(words_of(error), folder)
    # unpaired surrogates are not printable either
    text = "".join(character if character.isprintable() else " " for character in text)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"there is no {text}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def words_of(error: BaseException) -> str:
    """An exception's message; empty if its `__str__` fails."""
    try:
        return str(error)
    except BaseException:
        return ""


def refusal_of(error: BaseException) -> str | None:
    """The message of a pipeline's own check of its arguments: a ValueError or TypeError raised
    directly in a function of diffusers that checks something, as `check_inputs` does, or that reads
    timesteps, or in the pipeline's `__call__`; None for other errors."""
    if not isinstance(error, (ValueError, TypeError)) or error.__traceback__ is None:
        return None
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    checks = code.co_name.startswith(("check_", "retrieve_timesteps", "set_timesteps")) or (
        code.co_name == "__call__" and "return_dict" in code.co_varnames
    )
    raises = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return reason_of(error) if checks and raises else None


def public(text: str, folder: Path | None = None) -> str:
    """The text without paths of the server."""
    places = set() if folder is None else {str(folder), os.path.realpath(folder)}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(f"{place}/", "").replace(place, "the model's directory")
    return _PATH.sub(lambda path: path[1] or path[2], re.sub(r"\bfile:/+", "/", text))
