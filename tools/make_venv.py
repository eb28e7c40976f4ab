"""Makes a virtual environment and installs into it, also where Python came without ensurepip (Debian, Ubuntu).

    python3 tools/make_venv.py .venv -e '.[dev]'

Only the standard library is used. pip comes from ensurepip where there is one, else from the package index that
pip itself is configured to use (PIP_INDEX_URL, PIP_CONFIG_FILE, pip.conf), checked against the index's SHA-256.
pip installs uv, which installs the rest in a third of pip's time. Where uv cannot, pip does.
"""

from __future__ import annotations

import configparser
import hashlib
import html.parser
import importlib.util
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import venv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

DEFAULT_INDEX = "https://pypi.org/simple"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON = (3, 11)
TORCH = "torch>=2.11,<2.16"
# Settings of pip that are options of uv, and those that uv does without: it reads certificates from SSL_CERT_FILE.
UV_OPTIONS = {"index-url": "--index-url", "find-links": "--find-links", "constraint": "--constraints"}
NOT_NEEDED = {"cert", "default-timeout", "timeout", "retries", "disable-pip-version-check", "no-cache-dir", "quiet"}


def main(words: list[str]) -> int:
    """Make the environment `words[0]` and hand the other words to its `pip install`."""
    if not words or words[0].startswith("-"):
        print(__doc__)
        return 2
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"Python 3.11 or newer is needed, this is {found}: name another, e.g. make PYTHON=python3.12")
        return 1
    folder = Path(words[0])
    try:
        python = make(folder)
        if words[1:]:
            install_torch(python, next((word for word in words[1:] if word.startswith("torch")), TORCH))
            install(python, words[1:])
    except (OSError, subprocess.CalledProcessError, LookupError) as error:
        print(f"{folder} could not be made: {error}", file=sys.stderr)
        return 1
    return 0


def make(folder: Path) -> Path:
    """The environment's python, with a working pip; what is there already is kept."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return python
    # Debian's ensurepip may be absent, or there without the wheels that it unpacks.
    if importlib.util.find_spec("ensurepip") is not None:
        unpacked = subprocess.run([python, "-m", "ensurepip", "--default-pip"], capture_output=True)
        if unpacked.returncode == 0:
            return python
    with tempfile.TemporaryDirectory() as downloads:
        wheel = download_pip(Path(downloads), os.environ)
        # A wheel is a zip file, and Python runs a package straight out of one.
        subprocess.run([python, f"{wheel}/pip", "install", "--quiet", "--no-index", str(wheel)], check=True)
    return python


def install(python: Path, words: list[str]) -> None:
    """Install what `words` name as for `pip install`, by uv unless pip has settings that are not for uv, or it fails.

    Raises:
        subprocess.CalledProcessError: pip failed, too.
    """
    settings, program = read_pip_settings(os.environ), str(python)
    options, pip = uv_options(settings), [program, "-m", "pip", "--disable-pip-version-check", "install"]
    if options is not None and subprocess.run([*pip, "--quiet", "uv"]).returncode == 0:
        environment = os.environ | ({"SSL_CERT_FILE": settings["cert"]} if "cert" in settings else {})
        uv = [program, "-m", "uv", "pip", "install", "--python", program, "--compile-bytecode", *options, *words]
        if subprocess.run(uv, env=environment).returncode == 0:
            return
    subprocess.run([*pip, *words], check=True)


def uv_options(settings: Mapping[str, str]) -> list[str] | None:
    """pip's settings as options of uv; None if it has none for one of them."""
    if settings.keys() - UV_OPTIONS.keys() - NOT_NEEDED:
        return None
    return [word for name, option in UV_OPTIONS.items() for one in settings.get(name, "").split()
            for word in (option, one)]  # fmt: skip


def install_torch(python: Path, release: str) -> None:
    """Get this release of torch built for processors where that is the right one: it is 200 MB, the usual one 3 GB.

    Nothing is done on a machine with an NVIDIA card, off Linux, or where someone configured an index or a folder of
    wheels, whose choice stands. If it cannot be had, the later installation takes the usual build.
    """
    if not sys.platform.startswith("linux") or has_nvidia_card() or is_configured(os.environ):
        return
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode:
        with suppress(subprocess.CalledProcessError):
            install(python, ["--index-url", CPU_TORCH_INDEX, release])


def has_nvidia_card() -> bool:
    """True if the driver of an NVIDIA card is loaded."""
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists()


def read_pip_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """pip's settings of all levels, the stronger ones winning: files of the machine, the user, then variables."""
    home = Path(environment.get("HOME", "~")).expanduser()
    machine = [Path(folder) / "pip/pip.conf" for folder in environment.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")]
    user = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    files = [*machine, Path("/etc/pip.conf"), home / ".pip/pip.conf", user / "pip/pip.conf"]
    files += [Path(environment["PIP_CONFIG_FILE"])] if environment.get("PIP_CONFIG_FILE") else []
    settings: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        parser.read(file, encoding="utf-8")
        for section in ("global", "install"):
            if parser.has_section(section):
                settings.update({key.replace("_", "-"): value for key, value in parser.items(section)})
    for name, value in environment.items():
        if name.startswith("PIP_") and value:
            settings[name[4:].lower().replace("_", "-")] = value
    return settings


def is_configured(environment: Mapping[str, str]) -> bool:
    """True if pip's settings name an index."""
    options = {"index-url", "extra-index-url", "find-links", "no-index"}
    return bool(options & set(read_pip_settings(environment)))


class _Links(html.parser.HTMLParser):
    """Collects the links of an index page that this Python may use and that were not withdrawn."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        link, needs = (
            values.get("href"),
            re.search(r">=\s*3\.(\d+)", values.get("data-requires-python") or ""),
        )
        too_new = needs is not None and (3, int(needs.group(1))) > sys.version_info[:2]
        if tag == "a" and link and "data-yanked" not in values and not too_new:
            self.found.append(link)


def newest_wheel(page: str) -> tuple[str, str]:
    """The link and the SHA-256 of the newest release of pip on an index page (PEP 503).

    Raises:
        LookupError: there is none with a SHA-256.
    """
    links = _Links()
    links.feed(page)
    releases: list[tuple[tuple[int, ...], str, str]] = []
    for link in links.found:
        match = re.search(r"/?pip-(\d+(?:\.\d+)*)-py3-none-any\.whl#sha256=([0-9a-f]{64})$", link)
        if match:
            version = tuple(int(part) for part in match.group(1).split("."))
            releases.append((version, link.partition("#")[0], match.group(2)))
    if not releases:
        raise LookupError("the package index lists no release of pip; set PIP_INDEX_URL to one that does")
    _, link, digest = max(releases)
    return link, digest


def download_pip(folder: Path, environment: Mapping[str, str]) -> Path:
    """pip's wheel from the configured index, in `folder`.

    Raises:
        OSError: the index does not answer, or what came is not what it announced.
    """
    settings = read_pip_settings(environment)
    page_address = settings.get("index-url", DEFAULT_INDEX).rstrip("/") + "/pip/"
    context = ssl.create_default_context(cafile=settings.get("cert"))
    try:
        page = _fetch(page_address, context).decode("utf-8")
        link, digest = newest_wheel(page)
        content = _fetch(urllib.parse.urljoin(page_address, link), context)
    except urllib.error.URLError as error:
        raise OSError(f"the package index gave no pip ({error.reason}); check the network or PIP_INDEX_URL") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise OSError("pip's wheel arrived damaged; try again")
    wheel = folder / link.rsplit("/", 1)[-1]
    wheel.write_bytes(content)
    return wheel


def _fetch(address: str, context: ssl.SSLContext) -> bytes:
    request = urllib.request.Request(address, headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
