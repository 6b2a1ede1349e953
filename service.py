"""The BentoML service: `bentoml serve service.py`. Its code is `src/stepweave/api/bento.py`."""

import sys
from pathlib import Path

# neither `bentoml serve` nor a built bento adds the project's src folder to the path
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# `bentoml serve stepweave:TAG` first imports a module of that name, possibly an installed copy,
# instead of the bento's own
sys.modules.pop("stepweave", None)

from stepweave.api import bento

Stepweave = bento.complete(bento.service(bento.Stepweave))
