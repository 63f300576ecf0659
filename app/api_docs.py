"""The page /docs: Swagger UI over our own description, with every byte from here and no script but two files."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Depends, Request, Response

from app.auth.dependencies import counted_by_address

router = APIRouter(prefix="/docs", include_in_schema=False, dependencies=[Depends(counted_by_address)])

# The page's own: whatever it was told to load from elsewhere, or to run, its browser would not. Swagger UI has pictures
# in its style sheet as data.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_PAGE: Final = b"""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Bulkhead: its API</title>
<link rel="icon" href="/docs/favicon.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="api"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
# A credential that somebody types in stays in the page; `validatorUrl` would tell a stranger's host where we are.
_START: Final = b"""\
SwaggerUIBundle({
  url: '/openapi.json',
  dom_id: '#api',
  deepLinking: true,
  persistAuthorization: false,
  queryConfigEnabled: false,
  validatorUrl: null,
});
"""
_OWN: Final = {"start.js": _START}
ASSETS: Final = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon.png": "image/png",
    "start.js": "text/javascript; charset=utf-8",
}


@cache
def asset(name: str) -> tuple[bytes, str]:
    """What a file of the page holds, and its ETag."""
    content = _OWN.get(name) or files("fastapi_offline").joinpath("static", name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


@router.get("")
async def read_page() -> Response:
    """Nothing in it is of this installation; it asks for /openapi.json, as anybody may."""
    return Response(_PAGE, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": POLICY})


async def _read_asset(request: Request) -> Response:
    """A file of the page, which a browser keeps and asks about: one and a half megabytes are sent once."""
    name = request.url.path.rpartition("/")[2]
    content, etag = asset(name)
    headers = {"ETag": etag, "Cache-Control": "public, no-cache"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=ASSETS[name], headers=headers)


for _name in ASSETS:
    router.add_api_route(f"/{_name}", _read_asset)
