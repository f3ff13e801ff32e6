"""Which URLs the server may fetch: the list of allowed places, and which addresses count as private."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from msgspec import Struct
from yarl import URL

from vlmrt.runtime.errors import StartupError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")))
_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
_NUMERIC_LABEL = re.compile(r"(0x[0-9a-f]*|[0-9]+)\Z")


class RefusedUrl(ValueError):
    """The URL or the address behind it is outside the policy; the message is fit for a client."""


class AllowedPlace(Struct, frozen=True):
    """One entry of the list: a host name, a network, or with neither every public address; None: any port."""

    host: str | None
    network: Network | None
    port: int | None


class MediaPolicy:
    """Decides twice: may this URL be tried, and may a connection to this address of it be made."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """Raises: StartupError for an entry that is no host, IP, CIDR or "*", each with an optional :port."""
        self._places = tuple(map(_parse_place, allowed))

    @property
    def fetches(self) -> bool:
        return bool(self._places)

    def check_url(self, text: str) -> URL:
        """The URL to dial, parsed once: what is checked here is the very object that is dialled.

        Raises: RefusedUrl.
        """
        url = _parse_url(text)
        host, port = _host(url), url.port or 0
        address = _literal(host)
        for place in self._places:
            if place.port is not None and place.port != port:
                continue
            if place.network is not None:
                if address is not None and address in place.network:
                    return url
            elif place.host is None or place.host == host:
                return url
        raise RefusedUrl("this host and port are not among the allowed media domains")

    def check_address(self, url: URL, address_text: str) -> None:
        """A private address needs to be listed itself and to stand in the URL itself: no name and no "*" reaches it.

        Raises: RefusedUrl.
        """
        address = _unmapped(ipaddress.ip_address(address_text.partition("%")[0]))
        if is_public(address):
            return
        literal, port = _literal(_host(url)), url.port
        listed = any(
            place.network is not None and address in place.network and place.port in (None, port)
            for place in self._places
        )
        if literal != address or not listed:
            raise RefusedUrl("the host is at a private address that is not among the allowed media domains")


def is_public(address: Address) -> bool:
    """False also for what can carry a private address inside: mapped, translated and tunnelled IPv6."""
    address = _unmapped(address)
    if isinstance(address, ipaddress.IPv6Address) and any(address in network for network in _EMBEDDING):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _unmapped(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _parse_url(text: str) -> URL:
    if "\\" in text or any(char <= " " or char == "\x7f" for char in text):
        raise RefusedUrl("the URL holds a backslash, a space or a control character")
    try:
        url = URL(text)
        port = url.port
    except (ValueError, UnicodeError):
        raise RefusedUrl("the URL cannot be parsed") from None
    authority = text.partition("://")[2]
    authority = re.split(r"[/?#]", authority, maxsplit=1)[0]
    if url.scheme not in ("http", "https") or not url.host or port is None:
        raise RefusedUrl("the URL has no host or no http(s) scheme")
    if url.user is not None or url.password is not None or "@" in authority:
        raise RefusedUrl("the URL holds a user name or password")
    if not authority.isascii() or "%" in authority:
        raise RefusedUrl("the URL's host holds characters other than ASCII")
    host = _host(url)
    if _literal(host) is None and (not _HOST_NAME.fullmatch(host) or _NUMERIC_LABEL.match(host.rpartition(".")[2])):
        raise RefusedUrl("the URL's host is neither a host name nor an IP address in its usual form")
    return url


def _host(url: URL) -> str:
    return (url.host or "").lower().rstrip(".")


def _literal(host: str) -> Address | None:
    try:
        return _unmapped(ipaddress.ip_address(host))
    except ValueError:
        return None


def _parse_place(entry: str) -> AllowedPlace:
    text, port = _split_port(entry)
    if text == "*":
        return AllowedPlace(None, None, port)
    try:
        return AllowedPlace(None, ipaddress.ip_network(text, strict=False), port)
    except ValueError:
        pass
    host = text.lower().rstrip(".")
    if not _HOST_NAME.fullmatch(host) or _NUMERIC_LABEL.match(host.rpartition(".")[2]):
        raise StartupError(
            f"--allowed-media-domains {entry!r}: not a host, an IP, a CIDR or '*', with an optional :port"
        )
    return AllowedPlace(host, None, port)


def _split_port(entry: str) -> tuple[str, int | None]:
    """IPv6 with a port is written in brackets: [::1]:8000."""
    bracketed = re.fullmatch(r"\[([^\]]+)\](?::(\d{1,5}))?", entry)
    plain = re.fullmatch(r"([^:]+):(\d{1,5})", entry)
    found = bracketed or plain
    if not found:
        return entry, None
    port = int(found[2]) if found[2] else None
    if port is not None and not 0 < port < 65536:
        raise StartupError(f"--allowed-media-domains {entry!r}: the port is not within 1 to 65535")
    return found[1], port
