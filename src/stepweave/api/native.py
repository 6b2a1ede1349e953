"""BentoML's native APIs: answers that its clients read as pictures."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from stepweave.api.http import until_disconnect
from stepweave.api.responses import handle_error
from stepweave.api.schemas import ImageRequest
from stepweave.errors import StepweaveError
from stepweave.server import Server


async def picture_response(request: Request, server: Server, body: ImageRequest) -> Response:
    """Generate one picture and answer with its file, or with the error in the contract's shape.

    Header values are percent-encoded, since a prompt may hold any character.
    """
    try:
        with server.metrics.counted():
            _, (file,) = await until_disconnect(request, server.generate(body))
    except StepweaveError as error:
        return handle_error(request, error)
    headers = {
        f"X-Stepweave-{name.replace('_', '-').title()}": quote(str(value), safe=" ,.:x")
        for name, value in file.values.items()
    }
    return Response(file.data, media_type=f"image/{body.output_format}", headers=headers)
