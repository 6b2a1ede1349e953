"""Makes `src/stepweave/loading/configs/merges.txt` from OpenAI's file of CLIP's vocabulary:

    python -m tools.clip_merges bpe_simple_vocab_16e6.txt.gz

The file is in github.com/openai/CLIP (folder `clip`; MIT), and in packages such as
open_clip_torch. Of its merges, CLIP uses the first 48,894.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

from stepweave.loading.clip_vocabulary import MERGES

SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
USED = 49_152 - 256 - 2
VERSION = "#version: 0.2"


def merges(compressed: bytes) -> str:
    """The text of `merges.txt`. Raises ValueError for another file than OpenAI's."""
    if hashlib.sha256(compressed).hexdigest() != SHA256:
        raise ValueError("not OpenAI's bpe_simple_vocab_16e6.txt.gz: its SHA-256 differs")
    lines = gzip.decompress(compressed).decode().split("\n")
    return "\n".join([VERSION, *lines[1 : USED + 1]]) + "\n"


if __name__ == "__main__":
    MERGES.write_text(merges(Path(sys.argv[1]).read_bytes()), encoding="utf-8")
