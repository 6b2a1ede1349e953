"""Why something failed, in one line that may leave the server: an exception's own words, without
the server's paths; and why calls run alone."""

from __future__ import annotations

import dis
import os
import re
from pathlib import Path
from typing import Literal

# of calls that share no forward, or of jobs that take turns
UnsharedReason = Literal[
    "state",  # the module keeps something of a call, or the pipeline changes the module
    "turns",  # a hook keeps the state of a call
    "callback",  # the job's own code has changed the module
    "cast",  # the pipeline casts the module for a while
    "failed",  # merged and alone differ
    "random",  # it draws random numbers
    "writes_arguments",
    "must_be_equal",  # calls that differ in some argument
    "too_alike",  # calls that were compared
    "not_finite",
    "not_comparable",  # arguments or results without rows
    "reproducible",  # as the job asked for
    "error",
]
UnsharedNote = tuple[UnsharedReason, str]  # and in words

LONGEST = 400  # characters of a reason

# an absolute path with at least one folder; not what follows a scheme, as in https://
_PATH = re.compile(
    r"(?<![\w./~-])~?(?:/(?!/)[\w.@+%=,-]+)+/([\w.@+%=,-]+)|\b[A-Za-z]:(?:\\[\w.@+%=,-]+)+\\([\w.@+%=,-]+)"
)


def reason_of(error: BaseException, folder: Path | None = None) -> str:
    """What an exception says, on one line and cut to a sane length; its class where it says
    nothing.

    Paths in `folder`, a model's directory, become relative to it; of other absolute ones the last
    name is left.
    """
    if isinstance(error, OSError) and error.strerror:
        name = public(str(error.filename), folder) if error.filename else ""
        text = f"{name}: {error.strerror}" if name else error.strerror
    else:
        text = public(words_of(error), folder)
    # nor half a surrogate pair
    text = "".join(character if character.isprintable() else " " for character in text)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"there is no {text}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def words_of(error: BaseException) -> str:
    """What an error says; nothing if it is one of somebody's own that cannot."""
    try:
        return str(error)
    except BaseException:
        return ""


def refusal_of(error: BaseException) -> str | None:
    """What a pipeline's own check of its arguments says; None if an error is no such refusal.

    It is a ValueError that `check_inputs`, as diffusers calls it, or a pipeline's call itself
    raises, and nothing that they call.
    """
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return None
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    checks = code.co_name == "check_inputs" or (
        code.co_name == "__call__" and "num_inference_steps" in code.co_varnames
    )
    raises = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return reason_of(error) if checks and raises else None


def public(text: str, folder: Path | None = None) -> str:
    """A text without the server's paths."""
    for place in (
        ()
        if folder is None
        else sorted({str(folder), os.path.realpath(folder)}, key=len, reverse=True)
    ):
        text = text.replace(f"{place}/", "").replace(place, "the model's directory")
    return _PATH.sub(lambda path: path[1] or path[2], re.sub(r"\bfile:/+", "/", text))
