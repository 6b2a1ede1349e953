"""Makes images with the pipeline's own call, one at a time. Standard input is a JSON object of
paths and requests; each image is written as PNG to its path."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.ladder.servers.model import Asked, call, load


def main() -> None:
    wanted = json.load(sys.stdin)
    pipeline = load()
    for path, body in wanted.items():
        (image,) = call(pipeline, [Asked.of(body)])
        unfinished = Path(f"{path}.part")
        image.save(unfinished, "PNG")
        os.replace(unfinished, path)


if __name__ == "__main__":
    main()
