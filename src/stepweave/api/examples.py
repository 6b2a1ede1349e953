"""A command of curl for each operation."""

from __future__ import annotations

import json
import re
import shlex

from stepweave.api.middleware.probes import DRAIN
from stepweave.api.operations import FORM, JSON, STREAM, Operation

UNKNOWN = "URL"  # of a host that this server does not trust
_EDIT = ("image=@image.png", "prompt=a large red circle on a blue background")


def curl(operation: Operation, root: str, *, key: bool) -> str:
    """The command that sends an operation's example to a server at the URL `root`; `key`: keys are
    set. What is to be replaced is in capitals: KEY, the TOKEN of a drain, names in the path."""
    words = ["curl", "-s"]
    if operation.method not in ("get", "post"):
        words += ["-X", operation.method.upper()]
    elif operation.method == "post" and not operation.body:
        words += ["-X", "POST"]
    if operation.path == DRAIN:
        words += ["-H", "Authorization: Bearer TOKEN"]
    elif key and not operation.keyless:
        words += ["-H", "Authorization: Bearer KEY"]
    if FORM in operation.body:
        for field in _EDIT:
            words += ["-F", field]
    elif JSON in operation.body:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(dict(operation.example))]
    content = set(operation.answers[200].content if 200 in operation.answers else ())
    if content == STREAM.keys():
        words.append("-N")  # events as they come
    elif content and all(media.startswith("image/") for media in content):
        words += ["-o", "answer.png"]
    # curl expands braces
    path = re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), operation.path)
    return shlex.join([*words, root + path])
