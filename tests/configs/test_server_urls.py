"""The URL of a server says where, and never with which password."""

from __future__ import annotations

from urllib.parse import quote, unquote

import pytest

from patune.errors import InvalidValueError
from patune.settings import ServerUrl, parse_place

HIDDEN = {
    "postgresql://me:wr0ng@host/name": "postgresql://me:***@host/name",
    "postgresql://me:wr0%40ng@[::1]:5432/name": "postgresql://me:***@[::1]:5432/name",
    "postgres://:wr0ng@host": "postgres://:***@host",
    "postgresql://host/name?user=me&password=wr0ng&sslmode=require": (
        "postgresql://host/name?user=me&password=***&sslmode=require"
    ),
    "postgresql://host/name?sslpassword=wr0ng": "postgresql://host/name?sslpassword=***",
    "postgresql+psycopg://me:wr0ng:x@a,b/name": "postgresql+psycopg://me:***@a,b/name",
    "postgresql://me@host/name": "postgresql://me@host/name",
    "postgresql://host:5432/name": "postgresql://host:5432/name",
}


SECRETS = ("wr0ng:x", "wr0@ng", "wr0ng")


@pytest.mark.parametrize("url", HIDDEN)
def test_a_password_is_never_shown(url: str) -> None:
    place = parse_place(url)
    assert isinstance(place, ServerUrl)
    assert (str(place), repr(place)) == (HIDDEN[url], f"ServerUrl({HIDDEN[url]!r})")
    secret = next((secret for secret in SECRETS if secret in unquote(url)), "none")
    told = place.scrub(f'bad URI "{url}": user "me", password {secret} or {quote(secret)}')
    shown = "***" if secret != "none" else "none"
    assert told == f'bad URI "{HIDDEN[url]}": user "me", password {shown} or {shown}'


@pytest.mark.parametrize(
    "password", ["p@wr0ng", "p/wr0ng", "p?wr0ng@", "p#wr0ng", "p/x@wr0ng", "1?wr0ng", "p@x/wr0ng"]
)
def test_a_password_that_must_be_encoded_is_refused_unseen(password: str) -> None:
    with pytest.raises(InvalidValueError, match="percent-encoded, as %40 %2F") as error:
        parse_place(f"postgresql://me:{password}@host/name")
    assert "wr0ng" not in str(error.value)
