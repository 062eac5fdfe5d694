"""Checks made of every request before its body is read: who sends it, and how large it is."""

from __future__ import annotations

import re
from typing import Any

from fastapi import HTTPException

from ahn.serve.errors import ApiError
from ahn.serve.keys import Keys
from ahn.serve.settings import Limits

OWNER = "ahn_owner"  # in the scope of a request
FORM = "multipart/form-data"
OPEN = "/health"  # needs no key
LOCAL = "localhost", "127.0.0.1", "[::1]"
_PORT = re.compile(r":\d+$")


class Gate:
    """Refuses requests without a valid key, those that a web page of another site makes a browser send, and bodies that
    are too large.

    Args:
        keys: None: whoever reaches the server on this machine may use it.
    """

    def __init__(self, app: Any, keys: Keys | None, limits: Limits) -> None:
        self.app, self.keys, self.limits = app, keys, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        form = headers.get(b"content-type", "").lower().startswith(FORM)  # goes to disk; all else is held in memory
        most = self.limits.upload if form or scope["method"] == "PUT" else self.limits.body
        try:
            self._check_site(headers)
            if scope["path"] != OPEN:
                scope[OWNER] = "" if self.keys is None else self.keys.owner(headers.get(b"authorization", ""))
            declared = headers.get(b"content-length", "0")
            if declared.isdigit() and int(declared) > most:
                raise ApiError(413, _too_large(most), code="too_large")
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        seen = 0

        async def bounded() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, _too_large(most))  # an error of its own would become a 400
            return message

        await self.app(scope, bounded, send)

    def _check_site(self, headers: dict[bytes, str]) -> None:
        """Raises ApiError 403 for what a page of another site has a browser send. A browser names the page's site, or
        a host of that site whose address has been made this machine's."""
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, f"Origin {origin[:80]!r}: expected none, or that of this server", code="origin")
        if self.keys is None and _PORT.sub("", host) not in LOCAL:
            raise ApiError(403, f"Host {host[:80]!r}: expected {', '.join(LOCAL)}", code="host")


def _too_large(most: int) -> str:
    return f"body: expected at most {most:,} bytes"
