"""Images from a few hosts that the operator of the server has named: by https, from public addresses, within limits.

A request could otherwise make the server ask machines that only it can reach (server-side request forgery). So a name
is resolved once, every address that it has must be a public one, the connection goes to the address that was checked,
and no redirect is followed. Error messages name no address.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial

import httpx

from openm6.serve.content import Content, ImagePart
from openm6.serve.errors import BadRequestError

PORT = 443
MAX_FETCHES = 4  # at the same time
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that lead to an IPv4 one


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


class Fetcher:
    """Fetches the images that chats, embeddings and rankings name by `image_url`."""

    def __init__(self, hosts: Iterable[str], max_bytes: int, seconds: float) -> None:
        """`seconds` are for all images of a request together."""
        self.hosts = frozenset(hosts)
        self.max_bytes, self.seconds = max_bytes, seconds
        # Of its own: names that do not resolve in time must not hold the threads in which other requests are read.
        self._resolvers = ThreadPoolExecutor(MAX_FETCHES, "resolve")
        # Not a client of httpx: that would keep cookies and use proxies.
        self.transport: httpx.AsyncBaseTransport = httpx.AsyncHTTPTransport(
            verify=ssl.create_default_context(),
            limits=httpx.Limits(max_connections=MAX_FETCHES, max_keepalive_connections=0),
        )

    async def fetch_all(self, turns: Iterable[tuple[str, Content | None]]) -> None:
        """Replace https URLs of images in turns, which come with their fields, by data URLs; raise BadRequestError."""
        if not self.hosts:
            return  # what is no data URL is refused when it is read
        remote = [
            (f"{turn}.{index}.image_url.url", part.image_url)
            for turn, content in turns
            for index, part in enumerate(content if isinstance(content, list) else [])
            if isinstance(part, ImagePart) and not part.image_url.url.startswith("data:")
        ]
        try:
            async with asyncio.timeout(self.seconds):
                for param, image in remote:
                    data = await self.fetch(image.url, param)
                    image.url = "data:;base64," + base64.b64encode(data).decode()
        except TimeoutError:
            sentence = f"{param} did not come within {self.seconds:g} s: send the image as a data URL"
            raise BadRequestError(sentence, param) from None

    async def fetch(self, url: str, param: str) -> bytes:
        """Return the bytes at a URL; raise as `fetch_all`."""
        parsed = self._checked(url, param)
        host = parsed.raw_host.decode()
        try:
            addresses = await self.resolve(host)
        except OSError:
            addresses = []
        if not addresses or not all(map(is_public, addresses)):
            raise BadRequestError(f"{param} names a host without a public address: use another", param)
        headers = {"Host": host, "User-Agent": "openm6", "Connection": "close"}
        headers |= {"Accept": "image/*", "Accept-Encoding": "identity"}
        # To the address that was checked, whatever the name resolves to now; the certificate must be the host's.
        target, extensions = parsed.copy_with(host=addresses[0]), {"sni_hostname": host}
        request = httpx.Request("GET", target, headers=headers, extensions=extensions)
        data = bytearray()
        try:
            async with aclosing(await self.transport.handle_async_request(request)) as response:
                if response.status_code != 200:
                    sentence = f"{param} answers with status {response.status_code}, and redirects are not followed"
                    raise BadRequestError(f"{sentence}: give the image's own address", param)
                async for block in response.aiter_raw():
                    data += block
                    if len(data) > self.max_bytes:
                        raise BadRequestError(f"{param} has over {self.max_bytes:,} bytes: shrink it", param)
        except (httpx.TransportError, OSError):  # httpx passes on some errors of TLS as they are
            raise BadRequestError(f"{param} cannot be fetched: send the image as a data URL", param) from None
        return bytes(data)

    def _checked(self, url: str, param: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url if all("!" <= letter <= "~" for letter in url) else "")
        except httpx.InvalidURL:
            parsed = httpx.URL()
        known = parsed.scheme == "https" and parsed.raw_host.decode() in self.hosts and parsed.port in (None, PORT)
        if not known or parsed.userinfo:
            allowed = ", ".join(sorted(self.hosts))
            raise BadRequestError(f"{param} must be a data URL, or https:// and one of {allowed}: change it", param)
        return parsed

    async def resolve(self, host: str) -> list[str]:
        """Return all addresses of a host; raise OSError if it has none."""
        look_up = partial(socket.getaddrinfo, host, PORT, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._resolvers, look_up)
        return [str(address[0]) for *_, address in found]
