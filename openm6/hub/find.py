"""Models by name: paths, folders in ~/.openm6/models, models of the package, and ids of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from openm6.checkpoint.folder import SHIPPED, STATE_FILE, latest
from openm6.core.config import build
from openm6.core.errors import CheckpointError, nearest
from openm6.core.files import as_output_error, replace_text
from openm6.core.log import get_log
from openm6.hub.decoders import PackagedDecoder, decoder_file
from openm6.hub.importing import Additions, import_model
from openm6.hub.pretrained import ADDITION_FILE, HUB_ID, download, read_json, read_text

MADE_OF = "addition.sha256"  # in a model that was made of an addition of the package


def find_model(name: str | Path, options: Mapping[str, Any] | None = None) -> Path:
    """Return the folder of a model: a path, a name in OPENM6_HOME/models or ~/.openm6/models, or that of a shipped one,
    or an id of the Hub, fetched first, with `options` as for `download`.

    Of a shipped addition the whole model is made in the first of these folders, and again if a release has another one.
    """
    try:
        path, text = Path(name).expanduser(), str(name)
    except (TypeError, RuntimeError):  # no text, or the home of a user who is not there
        raise CheckpointError(f"{name!r} is neither a path nor the name of a model") from None
    is_path = path.exists() or isinstance(name, Path) or path.is_absolute() or (path.parent.is_dir() and "/" in text)
    # The addition `smol` in the working folder does not hide the model `smol` that it became.
    if is_path and not (path.parent == Path() and (path / ADDITION_FILE).is_file()):
        return _whole(path, path.name)
    if is_path or not HUB_ID.fullmatch(text):
        homes = [name for name in (os.environ.get("OPENM6_HOME"), "~/.openm6") if name]
        folders = [*(Path(home).expanduser() / "models" for home in homes), SHIPPED]
        found = [one for folder in folders if folder.is_dir() for one in sorted(folder.iterdir()) if one.is_dir()]
        if named := [one for one in found if one.name == text]:
            shipped, ours = SHIPPED / text, named[0] == SHIPPED / text
            decoder = read_json(shipped / ADDITION_FILE).get("decoder")
            if decoder and (ours or (named[0] / MADE_OF).is_file()):
                return _made(shipped, decoder, folders[0] / text if ours else named[0])
            return _whole(named[0], text)
        if is_path:
            return _whole(path, path.name)
        raise CheckpointError(
            f"there is no folder {text!r}, and no model of this name in {folders[0]}: name a run's folder, such as "
            f"runs/demo, which openm6 demo trains; {nearest(text, sorted({one.name for one in found}))}"
        )
    if text.startswith("runs/"):
        raise CheckpointError(f"there is no run at {text}: train or import it first, or name another model")
    try:
        return _whole(download(text, options), text.rpartition("/")[2], text)
    except ModuleNotFoundError:
        raise CheckpointError(
            f"there is no run at {text}: check the name, or pip install huggingface_hub to look for it on the Hub"
        ) from None


def _made(addition: Path, decoder: Any, out: Path) -> Path:
    """The whole model of a shipped addition at `out`, made now unless it is there; nothing is left if that fails."""
    if out.exists() and not (out / MADE_OF).is_file():
        raise CheckpointError(f"{out} is no model: move it away, so that {addition.name} can be written there")
    files = sorted(file for file in addition.iterdir() if file.is_file() and not file.name.startswith("."))
    digest = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()
    if _is_made_of(digest, out):
        return out
    base = decoder_file(build(PackagedDecoder, decoder, str(addition / ADDITION_FILE)))
    get_log().warning(f"writing {out} once: {addition.name} and its decoder")
    with as_output_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            made = Path(temporary, out.name)
            import_model(str(base), made, receipt=False, additions=Additions(adapter=addition))
            replace_text(made / MADE_OF, digest)
            # Unless another process was faster.
            if not _is_made_of(digest, out):
                with suppress(FileNotFoundError):
                    out.rename(Path(temporary, "before"))
                try:
                    made.rename(out)
                except OSError:
                    if not _is_made_of(digest, out):
                        raise
    return out


def _is_made_of(digest: str, path: Path) -> bool:
    with suppress(CheckpointError):
        return read_text(path / MADE_OF) == digest and latest(path).is_dir()
    return False


def _whole(path: Path, name: str, source: str | None = None) -> Path:
    """The path of a model; CheckpointError if it is an addition alone, or a model of another library."""
    published = (path / "config.json").is_file() and not (path / STATE_FILE).is_file()
    if published or path.suffix == ".gguf":
        source, out = source or str(path), Path("runs", name.removesuffix(".gguf"))
        raise CheckpointError(
            f"{source} is a model of another library: import it first, as openm6 import {source} --out {out}"
        )
    if (path / ADDITION_FILE).is_file():
        base = read_json(path / ADDITION_FILE).get("base_model")
        raise CheckpointError(
            f"{path} is an addition to {base}: put it onto that model, as "
            f"openm6 import {base} --adapter {path} --out ~/.openm6/models/{name}"
        )
    return path
