"""Who may do what: the host's answer, and what a browser must show before anything is changed."""

from __future__ import annotations

import hashlib
import hmac
import inspect
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from enum import IntFlag
from typing import Any
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request

logger = logging.getLogger(__name__)

_TOKEN_SECONDS = 12 * 3600


class Access(IntFlag):
    """What somebody may do on the board: ``Access.READ | Access.RETRY``; ``ACT`` is everything."""

    NONE = 0
    READ = 1
    SUBMIT = 2 | READ
    CANCEL = 4 | READ
    RETRY = 8 | READ
    RESCUE = 16 | READ
    ACT = SUBMIT | CANCEL | RETRY | RESCUE

    def may(self, wanted: Access) -> bool:
        """Whether this contains ``wanted``."""
        return self & wanted == wanted


Authorize = Callable[[Request], Access | Awaitable[Access]]
"""What a host says of a request. May be ``async``; a plain function runs in a thread."""


async def access_of(request: Request, authorize: Authorize | None) -> Access:
    """Return what this request may do; without ``authorize`` it may read.

    Raises:
        HTTPException: Nothing at all (403); or ``authorize`` failed (500), unless it raised one itself.
    """
    access = Access.READ if authorize is None else await _asked(request, authorize)
    if not access.may(Access.READ):
        raise HTTPException(403, "You may not see this board.")
    return access


async def _asked(request: Request, authorize: Authorize) -> Access:
    try:
        found: Any = (
            authorize(request)
            if inspect.iscoroutinefunction(authorize)
            else await run_in_threadpool(authorize, request)
        )
        access = await found if inspect.isawaitable(found) else found
    except HTTPException:
        raise
    except Exception as error:
        logger.exception("authorize failed; the request is refused")
        raise HTTPException(500, "What you may do could not be found out.") from error
    if isinstance(access, Access):
        return access
    logger.error("authorize returned %r, no Access; the request is refused", access)
    return Access.NONE


def check_same_origin(request: Request) -> None:
    """Refuse a write that another site's page sends with this person's cookies.

    Every browser since 2023 says where a request comes from in ``Sec-Fetch-Site``; older ones say the ``Origin`` of a POST.

    Raises:
        HTTPException: It comes from elsewhere, or does not say (403).
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        if site == "same-origin":
            return
        raise HTTPException(403, "This form was sent from another site; nothing was done.")
    origin = request.headers.get("origin")
    if origin is None or _place_of(origin) != request.headers.get("host", "").lower():
        raise HTTPException(403, "This request does not say that it comes from this site; nothing was done.")


def _place_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # a host in brackets that is no address
        return None


def check_api_origin(request: Request) -> None:
    """Refuse what a page of another site could send to the API; programs, which send neither header, may pass.

    Raises:
        HTTPException: It comes from elsewhere (403).
    """
    if request.headers.get("sec-fetch-site") is not None or request.headers.get("origin") is not None:
        check_same_origin(request)


class Tokens:
    """A token in each form, so that one cannot be sent by whoever has not seen the page. Without a cookie.

    Args:
        secret: Shared by the processes of one board; None makes one for this process.
    """

    def __init__(self, secret: str | None) -> None:
        self._key = hashlib.sha256((secret or secrets.token_hex(32)).encode()).digest()

    def new(self) -> str:
        """Return a token that is good for twelve hours."""
        now = f"{int(time.time()):x}"
        return f"{now}.{self._sign(now)}"

    def check(self, token: str) -> None:
        """Refuse a token that is none, or too old.

        Raises:
            HTTPException: It is (403).
        """
        moment, _, signature = token.partition(".")
        known = hmac.compare_digest(signature.encode(), self._sign(moment).encode())
        if not known or not 0 <= time.time() - int(moment, 16) <= _TOKEN_SECONDS:
            raise HTTPException(
                403, "This form is too old, or from another process. Go back, reload the page, try again."
            )

    def _sign(self, moment: str) -> str:
        return hmac.new(self._key, moment.encode(), hashlib.sha256).hexdigest()
