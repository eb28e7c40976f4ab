"""The virtual environment is made also where Python came without ensurepip, from the index that pip is told to use."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools import make_venv

# A pip of ten lines: `install` copies it into the environment that runs it, anything else succeeds.
SMALL_PIP = """
import pathlib, sys, sysconfig, zipfile
if sys.argv[1] == "install":
    wheel = next(word for word in sys.argv if word.endswith(".whl"))
    zipfile.ZipFile(wheel).extractall(sysconfig.get_path("purelib"))
else:
    print("pip 99.1", pathlib.Path(__file__).parent)
"""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a package index on this machine that offers the small pip."""
    folder = tmp_path / "index/pip"
    folder.mkdir(parents=True)
    wheel = folder / "pip-99.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pip/__main__.py", SMALL_PIP)
        archive.writestr("pip/__init__.py", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "index.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path / "index")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture
def no_ensurepip(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "ensurepip" else real(name, *rest)
    )


@pytest.mark.usefixtures("no_ensurepip")
def test_without_ensurepip_pip_comes_from_the_index(
    tmp_path: Path, index: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index[0])
    python = make_venv.make(tmp_path / "venv")
    shown = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("pip 99.1") and str(tmp_path / "venv") in shown
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1")  # nobody there: what is made is kept, not fetched again
    assert make_venv.make(tmp_path / "venv") == python


def test_a_damaged_download_is_refused(tmp_path: Path, index: tuple[str, Path]) -> None:
    address, folder = index
    (folder / "pip-99.1-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(OSError, match="damaged"):
        make_venv.download_pip(tmp_path, {"PIP_INDEX_URL": address})


def test_an_index_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the package index gave no pip .*check the network or PIP_INDEX_URL"):
        make_venv.download_pip(tmp_path, {"PIP_INDEX_URL": "http://127.0.0.1:1/simple"})


def link(version: str, attributes: str = "") -> str:
    return f'<a href="../w/pip-{version}-py3-none-any.whl#sha256={"0" * 64}" {attributes}>pip-{version}</a>\n'


def test_the_newest_release_that_fits_is_taken() -> None:
    page = link("9.0.3") + link("24.10", 'data-requires-python="&gt;=3.8"') + link("24.9")
    page += link("99.0", "data-yanked") + link("98.0", 'data-requires-python="&gt;=3.99"')
    page += link("25.0b1")  # a trial release
    page += '<a href="pip-97.0.tar.gz#sha256=00">pip-97.0.tar.gz</a>'
    assert make_venv.newest_wheel(page) == ("../w/pip-24.10-py3-none-any.whl", "0" * 64)


def test_an_index_without_pip_is_told() -> None:
    with pytest.raises(LookupError, match="set PIP_INDEX_URL"):
        make_venv.newest_wheel("<a href='other-1.0-py3-none-any.whl'>other</a>")


def test_settings_of_pip_the_stronger_ones_win(tmp_path: Path) -> None:
    machine, user = tmp_path / "xdg/pip/pip.conf", tmp_path / "home/.config/pip/pip.conf"
    for path, text in (
        (machine, "index-url = https://machine\nnote = mine"),
        (user, "index_url = https://user"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(f"[global]\n{text}\n")
    environment = {"HOME": str(tmp_path / "home"), "XDG_CONFIG_DIRS": str(tmp_path / "xdg")}
    settings = make_venv.read_pip_settings(environment)
    assert (settings["index-url"], settings["note"]) == ("https://user", "mine")
    stronger = make_venv.read_pip_settings({**environment, "PIP_INDEX_URL": "https://variable"})
    assert stronger["index-url"] == "https://variable"
    assert make_venv.is_configured(environment)


def test_an_old_python_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    assert make_venv.main(["somewhere"]) == 1
    assert "Python 3.11 or newer is needed, this is 3.10.12" in capsys.readouterr().out


def test_failure_to_install_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert make_venv.main([str(tmp_path / "file/venv")]) == 1
    assert "could not be made" in capsys.readouterr().err


def test_settings_of_pip_become_options_of_uv() -> None:
    settings = {"index-url": "https://one", "find-links": "/a /b", "cert": "/c.pem", "timeout": "9"}
    assert make_venv.uv_options(settings) == ["--index-url", "https://one", "--find-links", "/a", "--find-links", "/b"]
    # uv would take torch from the first index that has it, whatever the other one offers.
    assert make_venv.uv_options(settings | {"extra-index-url": "https://two"}) is None


@pytest.mark.parametrize(("broken", "by"), [("", "uv"), ("uv pip", "pip"), ("pip install --quiet uv", "pip")])
def test_pip_installs_what_uv_cannot(broken: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(words: list[str], check: bool = False, **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(" ".join(map(str, words)).replace("--disable-pip-version-check ", ""))
        return subprocess.CompletedProcess(words, int(bool(broken) and f"-m {broken}" in ran[-1]))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(make_venv, "read_pip_settings", lambda _: {})
    make_venv.install(Path("python"), ["one"])
    assert ran[-1].startswith(f"python -m {by}") and ran[-1].endswith(" one")
