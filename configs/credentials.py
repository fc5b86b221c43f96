"""Credentials in URIs: taken out where a URI is read, so that no file, message or record of this program holds them."""

from __future__ import annotations

import json
import os
import re

KEPT = "METAGMVAE_URI_CREDENTIALS"
"""Environment variable with the URIs as they were given, by the URI without credentials, as JSON. It is never written
to a file; processes that this one starts (Ray workers on this machine) inherit it."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URI = re.compile(r"://\S+")
_PATTERNS = (
    (re.compile(r"://[^/?#\s]*@"), "://"),
    # A password with "/", "?" or "#" in it; a port before a path with "@" is not a password.
    (re.compile(r"://[^/\s:@]*:(?!\d{1,5}[/?#])[^\s@]*@(?:[^\s/?#@]*@)*"), "://"),
    # A URI in the query of another one, percent-encoded.
    (re.compile(r"%3[Aa](?:%2[Ff]|/){2}[^&\s]*?(?:%40|@)"), "%3A%2F%2F"),
)
_SECRET_NAME = r"[\w.-]*(?:key|secret|token|passw|pwd|sig|credential|auth|session)[\w.-]*"
_SECRET_VALUE = re.compile(rf"([?&;]{_SECRET_NAME}=)[^&;\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """Remove user names, passwords and tokens from all URIs in a text: `s3://key:secret@b` becomes `s3://b`."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return _URI.sub(lambda uri: _SECRET_VALUE.sub(r"\1***", uri[0]), text)


def take_credentials(uri: str) -> str:
    """Return a URI without credentials and keep the given one in the environment of this process; paths are kept."""
    if not _SCHEME.match(uri):
        return uri
    public = redact(uri)
    if public != uri:
        os.environ[KEPT] = json.dumps(_kept() | {public: uri})
    return public


def with_credentials(uri: str) -> str:
    """Return a URI as it was given, to connect with; it must not be shown or stored."""
    return _kept().get(uri, uri)


def _kept() -> dict[str, str]:
    kept: dict[str, str] = json.loads(os.environ.get(KEPT, "{}"))
    return kept
