"""Serves a step loop: `python -m benchmarks.ladder.servers.loop --rule size --port 3001`."""

from __future__ import annotations

import argparse
import asyncio
from concurrent.futures import Future

import uvicorn
from PIL.Image import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from benchmarks.ladder.servers.model import PATH, Asked, answer, load, png
from benchmarks.ladder.servers.step_loop import RULES, StepLoop


def app(loop: StepLoop) -> Starlette:
    async def generate(request: Request) -> Response:
        image: Future[Image] = loop.submit(Asked.of(await request.json()))
        done = await asyncio.wrap_future(image)
        return JSONResponse(answer(await asyncio.to_thread(png, done)))

    async def ready(request: Request) -> Response:
        return PlainTextResponse("ready")

    return Starlette(
        routes=[Route(PATH, generate, methods=["POST"]), Route("/readyz", ready)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder.servers.loop")
    parser.add_argument("--rule", choices=RULES, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    loop = StepLoop(load(), RULES[arguments.rule])
    uvicorn.run(app(loop), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
