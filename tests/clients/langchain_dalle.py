"""What LangChain's DALL-E wrapper makes of the server: `python langchain_dalle.py URL` writes the
URL that it got to stdout, as JSON.

Runs in an environment of its own, which has langchain-community and not Stepweave. The wrapper asks
for `dall-e-3` unless told otherwise, wants URLs, and says so nowhere.
"""

from __future__ import annotations

import json
import sys

from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

if __name__ == "__main__":
    wrapper = DallEAPIWrapper(api_key="unused", base_url=f"{sys.argv[1]}/v1", size="64x64")
    json.dump(wrapper.run("a large red circle on a blue background"), sys.stdout)
