"""The page as an ASGI application: who may see it, and what is at which path.

Whoever has the address with the token in it may read, and there is nothing else to do here.
Every request is looked at before anything of it is used:

- its Host is this server by one of its own names, so that no page of another site reaches it by
  a name that it has made mean this machine (DNS rebinding);
- the first part of its path is the token.  It is in no cookie: browsers send those to every port
  of this machine, and another user may serve another port;
- its method is GET.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from importlib import resources
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libmshare.cli.errors import CommandError
from libmshare.cli.web.watching import DETAILS, Detail, Watch

FILES: Final[Mapping[str, str]] = {
    "page.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content-Security-Policy: our own files, and no text is ever taken for markup or script."""
_HEADERS: Final = (
    ("Content-Security-Policy", POLICY),
    ("Cache-Control", "no-store"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)


def application(watch: Watch, token: str, port: int) -> Starlette:
    """What the server serves at that port, below /TOKEN/."""
    return Starlette(
        routes=[
            *(
                Route(f"/{name if name != 'page.html' else ''}", partial(_file, *_load(name)))
                for name in FILES
            ),
            Route("/api/state", partial(_state, watch)),
            *(
                Route(f"/api/regions/{{number}}/{what}", partial(_detail, watch, ask))
                for what, ask in DETAILS.items()
            ),
        ],
        middleware=[Middleware(Guard, token=token, port=port)],
    )


class Guard:
    """Lets through what may be answered, without the token, and has headers on all answers."""

    def __init__(self, app: ASGIApp, *, token: str, port: int) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(key.lower().encode(), value.encode()) for key, value in _HEADERS]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        app = self._refusal(scope)
        if app is None:
            app = self._app
            # What is behind knows nothing of the token.
            path = scope["path"][len(self._token) + 1 :]
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return PlainTextResponse(
                "This page is for 127.0.0.1 and localhost, at the port that it was started with.\n",
                403,
            )
        token, slash, _ = scope["path"].removeprefix("/").partition("/")
        # Of any length and any characters, in a time that tells nothing of ours.
        right = secrets.compare_digest(token.encode(errors="surrogatepass"), self._token)
        if not (right and slash and scope["path"].startswith("/")):
            return PlainTextResponse("Open the address that mshare web has printed.\n", 403)
        if scope["method"] != "GET":
            return PlainTextResponse("There is only GET.\n", 405, {"Allow": "GET"})
        return None


def _load(name: str) -> tuple[bytes, str]:
    """A file of ours, and what it is."""
    return resources.files(__package__).joinpath(name).read_bytes(), FILES[name]


async def _file(content: bytes, kind: str, _: Request) -> Response:
    return Response(content, media_type=kind)


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


async def _state(watch: Watch, request: Request) -> Response:
    after = request.query_params.get("after", "")
    return _json(watch.state(int(after) if after.isdecimal() and len(after) < 16 else 0))


async def _detail(watch: Watch, ask: Detail, request: Request) -> Response:
    region = watch.region(request.path_params["number"])
    if region is None:
        return PlainTextResponse("There is no such region.\n", 404)
    try:
        return _json(await watch.detail(region, ask))
    except (CommandError, OSError) as failure:
        return PlainTextResponse(f"{failure}\n", 503)
