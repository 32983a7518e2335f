"""The page at `/`: one static file, and a policy that lets it do nothing but what it does."""

import base64
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coat_deploy.errors import RequestError

FILE = "page.html"
_BLOCK = r"<{tag}[^>]*>(.*?)</{tag}>"


def routes() -> list[Route]:
    """Return the route of the page; without the file it says that there is none."""
    content = _read()
    headers = {
        "content-security-policy": policy(content),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def page(request: Request) -> Response:
        if not content:
            raise RequestError("this server has no page. Ask /v2 or /models.", "not_found")
        return Response(content, media_type="text/html", headers=headers)

    return [Route("/", page, methods=["GET"])]


def policy(content: str) -> str:
    """Return the Content-Security-Policy of a page: its own blocks, this server, nothing else."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(content, 'script')}",
            f"style-src {_hashes(content, 'style')}",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hashes(content: str, tag: str) -> str:
    blocks = re.findall(_BLOCK.format(tag=tag), content, re.DOTALL | re.IGNORECASE)
    digests = [hashlib.sha256(block.encode()).digest() for block in blocks]
    return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests) or "'none'"


def _read() -> str:
    file = resources.files("coat_deploy.serve").joinpath(FILE)
    return file.read_text(encoding="utf-8") if file.is_file() else ""
