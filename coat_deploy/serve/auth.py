"""The token that clients have to show, if any."""

import hmac
import os
from pathlib import Path

from coat_deploy.errors import RequestError, ServerError

TOKEN_VARIABLE = "COAT_TOKEN"
SCHEME = "bearer"
LEAST = 16
"""Fewest characters of a token: shorter ones can be guessed."""
MAX_BYTES = 4096


class Door:
    """Lets in who shows the token; everyone, where there is none."""

    def __init__(self, token: str | None) -> None:
        self._token = token.encode() if token else None

    def check(self, authorization: str | None) -> None:
        """Raise RequestError unless an Authorization header shows the token.

        Takes as long whatever is wrong with it.
        """
        if self._token is None:
            return
        scheme, _, shown = (authorization or "").partition(" ")
        right = hmac.compare_digest(shown.strip().encode(errors="replace"), self._token)
        if not right or scheme.lower() != SCHEME:
            raise RequestError(
                "authorization: no valid token was shown. Send 'Authorization: Bearer TOKEN'.",
                "unauthenticated",
            )


def read_token(path: Path | None) -> str | None:
    """Return the token of a file, or of $COAT_TOKEN, or None.

    Raises: ServerError for one that cannot be read or is too short to protect anything.
    """
    subject = f"${TOKEN_VARIABLE}" if path is None else str(path)
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE)
        if token is None:
            return None
    else:
        try:
            with path.open("rb") as file:
                token = file.read(MAX_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ServerError(f"{path}: the token cannot be read ({reason}).") from error
    token = token.strip()
    if len(token) < LEAST or not token.isascii() or not token.isprintable():
        raise ServerError(
            f"{subject}: not a token (expected {LEAST} or more ASCII characters in one line). "
            "Make one: python -c 'import secrets; print(secrets.token_urlsafe())'."
        )
    return token
