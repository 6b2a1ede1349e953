"""A file of prompts, one a line, several at once: `python many_prompts.py prompts.txt`.

`stepweave generate --file` does the same with progress bars.
"""

import asyncio
import base64
import os
import sys
from pathlib import Path

import httpx

server = os.environ.get("STEPWEAVE_URL", "http://localhost:3000")
AT_ONCE = 16


async def main(prompts: list[str]) -> None:
    places = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=server, timeout=None) as client:

        async def make(number: int, prompt: str) -> None:
            async with places:
                answer = await client.post("/v1/images/generations", json={"prompt": prompt})
                while answer.status_code == 429:  # the queue is full
                    await asyncio.sleep(float(answer.headers["Retry-After"]))
                    answer = await client.post("/v1/images/generations", json={"prompt": prompt})
            answer.raise_for_status()
            file = Path(f"prompt-{number}.png")
            file.write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
            print(file, prompt)

        await asyncio.gather(*(make(number, prompt) for number, prompt in enumerate(prompts, 1)))


lines = Path(sys.argv[1]).read_text().splitlines()
asyncio.run(main([line for line in lines if line.strip()]))
