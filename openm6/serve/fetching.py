"""Images from a few hosts that the operator of the server has named: by https, from public addresses, within limits.

A request could otherwise make the server ask machines that only it can reach (server-side request forgery). So a name
is resolved once, every address that it has must be a public one, the connection goes to the address that was checked,
and no redirect is followed. Error messages name no address.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import SplitResult, urlsplit

from openm6.serve.content import ImageURL
from openm6.serve.errors import BadRequestError

PORT = 443
BLOCK = 65_536  # bytes read at once
MAX_FETCHES = 4  # at the same time
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that lead to an IPv4 one

Resolve = Callable[[str], list[str]]  # a host's addresses
Dial = Callable[[str, str, float], socket.socket]  # address, host, seconds -> a connection for http


def is_public(address: str) -> bool:
    """Whether an address is a public one, also in the forms of IPv6 that stand for IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def resolve_by_system(host: str) -> list[str]:
    """Return all addresses of a host."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)]


def dial_by_tls(address: str, host: str, seconds: float) -> socket.socket:
    """Return a connection to this address whose certificate is that of the host."""
    plain = socket.create_connection((address, PORT), timeout=seconds)
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


class Fetcher:
    """Fetches the images that chats, embeddings and rankings name by `image_url`."""

    def __init__(
        self,
        hosts: Iterable[str],
        max_bytes: int,
        seconds: float,
        resolve: Resolve = resolve_by_system,
        dial: Dial = dial_by_tls,
    ) -> None:
        """`seconds` are for all images of a request together."""
        self.hosts = frozenset(hosts)
        self.max_bytes, self.seconds = max_bytes, seconds
        self._resolve, self._dial = resolve, dial
        self._pool = ThreadPoolExecutor(MAX_FETCHES, "fetch") if self.hosts else None

    async def fetch_all(self, images: Iterable[tuple[str, ImageURL]]) -> None:
        """Replace every https URL by a data URL of its content; images come with the names of their fields.

        Raises:
            BadRequestError: one is elsewhere, too large, or does not come in time.
        """
        remote = [(param, image) for param, image in images if not image.url.startswith("data:")]
        if self._pool is None or not remote:
            return  # without hosts, what is no data URL is refused when it is read
        end = time.monotonic() + self.seconds
        loop = asyncio.get_running_loop()
        for param, image in remote:
            fetched = loop.run_in_executor(self._pool, self.fetch, image.url, param, end)
            try:
                data = await asyncio.wait_for(fetched, max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise self._timeout(param) from None
            image.url = "data:;base64," + base64.b64encode(data).decode()

    def fetch(self, url: str, param: str, end: float) -> bytes:
        """Return the bytes at a URL, until the moment `end` of the monotonic clock; raise as `fetch_all`."""
        parts = self._checked(url, param)
        address = self._public_address(parts.hostname or "", param)
        try:
            with closing(self._dial(address, parts.hostname or "", max(0.1, end - time.monotonic()))) as line:
                # A host that sends a byte now and then would keep every single read within its time.
                cut = threading.Timer(max(0.0, end - time.monotonic()), _shut, [line])
                cut.start()
                try:
                    return self._read(line, parts, param)
                finally:
                    cut.cancel()
        except (OSError, http.client.HTTPException):
            if time.monotonic() >= end:
                raise self._timeout(param) from None
            raise BadRequestError(f"{param} cannot be fetched: send the image as a data URL", param) from None

    def _checked(self, url: str, param: str) -> SplitResult:
        allowed = ", ".join(sorted(self.hosts))
        sentence = f"{param} must be a data URL, or https:// and one of {allowed}: change it"
        if not all("!" <= letter <= "~" for letter in url):
            raise BadRequestError(sentence, param)
        try:
            parts = urlsplit(url)
            good = parts.scheme == "https" and parts.hostname in self.hosts and parts.port in (None, PORT)
        except ValueError:
            good = False
        if not good or "@" in parts.netloc:
            raise BadRequestError(sentence, param)
        return parts

    def _public_address(self, host: str, param: str) -> str:
        try:
            found = self._resolve(host)
        except OSError:
            found = []
        if not found or not all(is_public(address) for address in found):
            raise BadRequestError(f"{param} names a host without a public address: use another", param)
        return found[0]

    def _read(self, line: socket.socket, parts: SplitResult, param: str) -> bytes:
        connection = http.client.HTTPConnection(parts.hostname or "")
        connection.sock = line  # to the address that was checked, whatever the name resolves to now
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Accept": "image/*", "User-Agent": "openm6", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            sentence = f"{param} answers with status {response.status}, and redirects are not followed"
            raise BadRequestError(f"{sentence}: give the image's own address", param)
        data = bytearray()
        while block := response.read1(BLOCK):
            data += block
            if len(data) > self.max_bytes:
                raise BadRequestError(f"{param} has over {self.max_bytes:,} bytes: shrink it", param)
        if response.length:  # fewer bytes than were announced
            raise http.client.IncompleteRead(bytes(data))
        return bytes(data)

    def _timeout(self, param: str) -> BadRequestError:
        return BadRequestError(f"{param} did not come within {self.seconds:g} s: send the image as a data URL", param)


def _shut(line: socket.socket) -> None:
    try:
        line.shutdown(socket.SHUT_RDWR)
    except OSError:
        line.close()  # it had ended by itself
