"""Images from allowed hosts: nothing but public addresses, no redirects, few bytes, in time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from openm6.core.errors import ConfigError
from openm6.serve.content import MAX_FETCHES, Fetcher, ImagePart, ImageURL, is_public
from openm6.serve.errors import BadRequestError
from openm6.serve.run import read_serve_config
from tests.data.sample_images import png
from tests.load.server import Address
from tests.serve.running import answering, small_app

HOST, PUBLIC = "images.example.org", "93.184.215.14"
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class FakeWeb(httpx.AsyncHTTPTransport):
    """Answers every connection with the same bytes, and notes who was called."""

    def __init__(self, answer: bytes, addresses: list[str] | None = None, drip: float = 0.0) -> None:
        super().__init__()
        self.answer, self.drip = answer, drip
        self.addresses = [PUBLIC] if addresses is None else addresses
        self.called: list[tuple[str, str]] = []
        self.asked = b""

    async def resolve(self, host: str) -> list[str]:
        return self.addresses

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.scheme == "https" and request.url.port is None
        self.called.append((request.url.host, request.extensions["sni_hostname"]))
        listener = socket.create_server(("127.0.0.1", 0))
        request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=listener.getsockname()[1])
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return await super().handle_async_request(request)

    def _serve(self, listener: socket.socket) -> None:
        with listener, listener.accept()[0] as line:
            self.asked = line.recv(65_536)
            try:
                if not self.drip:
                    line.sendall(self.answer)
                    return
                for byte in self.answer:
                    line.send(bytes([byte]))
                    time.sleep(self.drip)
            except OSError:
                pass  # the other side has had enough

    def fetcher(self, seconds: float = 5.0) -> Fetcher:
        return self.behind(Fetcher((HOST,), 64, 1000, seconds))

    def behind(self, fetcher: Fetcher) -> Fetcher:
        """The fetcher, with these addresses and connections for those of the machine."""
        fetcher.resolve, fetcher.transport = self.resolve, self  # type: ignore[method-assign]
        return fetcher


def image(url: str) -> ImagePart:
    return ImagePart(type="image_url", image_url=ImageURL(url=url))


def fetched(web: FakeWeb, url: str = f"https://{HOST}/a.png?size=1", seconds: float = 5.0) -> bytes:
    part = image(url)
    asyncio.run(web.fetcher(seconds).fetch_all([("turn", [part])]))
    return base64.b64decode(part.image_url.url.removeprefix("data:;base64,"))


def test_an_image_comes_from_the_address_that_was_checked() -> None:
    web = FakeWeb(GOOD)
    assert fetched(web) == b"hello"
    assert web.called == [(PUBLIC, HOST)]
    assert web.asked.startswith(b"GET /a.png?size=1 HTTP/1.1\r\nHost: images.example.org\r\n")
    assert b"\r\nAccept-Encoding: identity\r\n" in web.asked


def test_images_of_a_request_share_their_bytes() -> None:
    fetcher = FakeWeb(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 400).fetcher()
    part = image(f"https://{HOST}/a.png")
    asyncio.run(fetcher.fetch_all([("turn", [part.model_copy(deep=True) for _ in range(2)])]))
    with pytest.raises(BadRequestError, match=r"turn.2.image_url.url makes the images over 1,000 bytes together"):
        asyncio.run(fetcher.fetch_all([("turn", [part.model_copy(deep=True) for _ in range(3)])]))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([f"https://{HOST}/b.png"] * 64, "turn holds 65 parts, over the limit of 64"),
        (["file:///etc"], "turn.1.image_url"),
    ],
)
def test_a_turn_that_will_be_refused_is_not_fetched(more: list[str], sentence: str) -> None:
    web = FakeWeb(GOOD)
    with pytest.raises(BadRequestError, match=sentence):
        asyncio.run(web.fetcher().fetch_all([("turn", [image(url) for url in (f"https://{HOST}/a.png", *more)])]))
    assert not web.called


def test_an_address_of_ipv6_is_called_as_well() -> None:
    web = FakeWeb(GOOD, ["2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
    assert fetched(web) == b"hello" and web.called[0][0] == web.addresses[0]


def test_an_error_of_tls_while_reading_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: httpx.Response) -> AsyncIterator[bytes]:
        raise ssl.SSLError("bad record mac")
        yield b""

    monkeypatch.setattr(httpx.Response, "aiter_raw", broken)
    with pytest.raises(BadRequestError, match="cannot be fetched"):
        fetched(FakeWeb(GOOD))


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}/a.png",
        "https://example.org/a.png",
        f"https://evil.{HOST}/a.png",
        f"https://{HOST}.evil.com/a.png",
        f"https://{HOST}@evil.com/a.png",
        f"https://me:secret@{HOST}/a.png",
        f"https://{HOST}:8443/a.png",
        f"https://{HOST}:x/a.png",
        f"https://{HOST}/a b.png",
        f"https://{HOST}/\r\nX: y",
        "https://[::1]/a.png",
        f"https://{PUBLIC}/a.png",
        "file:///etc/passwd",
        "gopher://x",
        "",
    ],
)
def test_other_urls_are_refused_before_anybody_is_called(url: str) -> None:
    web = FakeWeb(GOOD)
    with pytest.raises(BadRequestError, match=r"must be a data URL, or https:// and one of images\.example\.org"):
        fetched(web, url)
    assert not web.called


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.1.2.3"], ["169.254.169.254"], [PUBLIC, "192.168.0.1"], ["::1"], ["fd00::1"], []],
)
def test_a_name_that_leads_inside_is_refused(addresses: list[str]) -> None:
    web = FakeWeb(GOOD, addresses)
    with pytest.raises(BadRequestError, match="without a public address") as caught:
        fetched(web)
    assert not web.called and not any(address in str(caught.value) for address in addresses)


def test_public_addresses() -> None:
    inside = ("0.0.0.0", "100.64.0.1", "224.0.0.1", "240.0.0.1", "fe80::1%eth0", "::ffff:10.0.0.1")
    inside += ("2002:7f00:1::", "64:ff9b::7f00:1", "ff02::1", "::", "2001:db8::1")
    assert not any(is_public(address) for address in inside)
    assert is_public(PUBLIC) and is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


BROKEN = {
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "status 302, and redirects"),
    "an error": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
    "too many bytes": (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000, "over 1,000 bytes"),
    "cut short": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", "cannot be fetched"),
    "no http": (b"SSH-2.0-OpenSSH\r\n", "cannot be fetched"),
    "nothing": (b"", "cannot be fetched"),
}


@pytest.mark.parametrize(("answer", "sentence"), BROKEN.values(), ids=BROKEN)
def test_broken_answers_are_one_sentence(answer: bytes, sentence: str) -> None:
    with pytest.raises(BadRequestError, match=sentence):
        fetched(FakeWeb(answer))


def test_a_host_that_drips_is_cut_off() -> None:
    began = time.monotonic()
    with pytest.raises(BadRequestError, match=r"did not come within 0\.3 s"):
        fetched(FakeWeb(GOOD * 10, drip=0.1), seconds=0.3)
    assert time.monotonic() - began < 3


def test_all_images_of_a_request_share_one_time() -> None:
    web = FakeWeb(GOOD, drip=0.008)  # about 0.4 seconds each
    images = [image(f"https://{HOST}/{n}") for n in range(50)]
    began = time.monotonic()
    with pytest.raises(BadRequestError, match=r"did not come within 0\.6 s"):
        asyncio.run(web.fetcher(0.6).fetch_all([("turn", images)]))
    assert time.monotonic() - began < 10 and 1 <= len(web.called) <= 3


def test_names_that_do_not_resolve_hold_no_thread_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, threads = threading.Event(), set()

    def look_up(*_: object, **__: object) -> list[object]:
        threads.add(threading.current_thread().name)
        go_on.wait(30)
        return []

    async def fetch_many() -> list[object]:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        fetcher = Fetcher((HOST,), 64, 1000, 0.3)
        asked = (fetcher.fetch_all([("turn", [image(f"https://{HOST}/a")])]) for _ in range(2 * MAX_FETCHES))
        found = await asyncio.gather(*asked, return_exceptions=True)
        return [*found, await asyncio.to_thread(str, "read")]

    *found, read = asyncio.run(fetch_many())
    go_on.set()
    assert all("did not come within 0.3 s" in str(error) for error in found) and read == "read"
    assert len(threads) == MAX_FETCHES and all(name.startswith("resolve") for name in threads)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("owner", [HOST, "evil.org"])
def test_the_certificate_must_be_that_of_the_host(owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={owner}"]
    made += ["-addext", f"subjectAltName=DNS:{owner}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: trusting)
    monkeypatch.setattr("openm6.serve.content.is_public", lambda _: True)
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate, key)
    names: list[str | None] = []
    own.sni_callback = lambda line, name, context: names.append(name)  # type: ignore[assignment,misc]

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError), own.wrap_socket(listener.accept()[0], server_side=True) as line:
            line.recv(65_536)
            line.sendall(GOOD)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr("openm6.serve.content.PORT", port)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        fetcher, part = Fetcher((HOST,), 64, 1000, 10.0), image(f"https://{HOST}:{port}/a.png")
        fetcher.resolve = FakeWeb(GOOD, ["127.0.0.1"]).resolve  # type: ignore[method-assign]
        fetching = fetcher.fetch_all([("turn", [part])])
        if owner == HOST:
            asyncio.run(fetching)
            assert part.image_url.url == "data:;base64," + base64.b64encode(b"hello").decode()
        else:
            with pytest.raises(BadRequestError, match="cannot be fetched"):
                asyncio.run(fetching)
    assert names == [HOST]


def test_hosts_are_plain_names() -> None:
    assert read_serve_config([f'hosts=["{HOST.upper()}"]']).hosts == (HOST,)
    for host in (
        "127.0.0.1",
        "localhost",
        "*.example.org",
        "https://example.org",
        "example.org:80",
        "-a.org",
    ):
        with pytest.raises(ConfigError, match="must be a plain name"):
            read_serve_config([f'hosts=["{host}"]'])


@pytest.fixture
def served() -> Iterator[Callable[[FakeWeb | None], Address]]:
    app = small_app(hosts=(HOST,))
    with answering(app) as found:

        def behind(web: FakeWeb | None) -> Address:
            if web is not None:
                web.behind(app.state.server.fetcher).max_bytes = 10**6
            return found

        yield behind


def test_chats_and_ranks_see_what_was_fetched(served: Callable[[FakeWeb | None], Address]) -> None:
    data = png("red", 40)
    web = FakeWeb(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    address = served(web)
    image = {"type": "image_url", "image_url": {"url": f"https://{HOST}/a.png"}}
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": [image]}]}
    assert address.post("/v1/chat/completions", body).status == 200
    assert address.post("/v1/rank", {"query": [image], "candidates": ["a"]}).status == 200
    assert len(web.called) == 2
    image["image_url"] = {"url": "https://127.0.0.1/a.png"}
    refused = address.post("/v1/chat/completions", body)
    assert refused.status == 400 and b"messages.0.content.0.image_url.url must be a data URL" in refused.body
