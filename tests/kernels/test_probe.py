"""The probe of a device: what it reports where kernels, the compiler or a cache do not work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from openm6.core.errors import ConfigError
from openm6.kernels import probe
from openm6.kernels.probe import CACHE, Capabilities, capabilities, compile_failure, failure_of, kernel_failure
from tests.triton_interpreter import need_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def fails(error: BaseException) -> str | None:
    def trial() -> bool:
        raise error

    return failure_of(trial)


def wrapped(inner: BaseException) -> RuntimeError:
    """An error of torch's compiler, which holds the cause."""
    outer = RuntimeError("backend='inductor' raised")
    outer.inner_exception = inner  # type: ignore[attr-defined]
    return outer


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC."), "apt-get install gcc"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "headers of Python"),
        (wrapped(RuntimeError("Failed to find C compiler.")), "apt-get install gcc"),
        (PermissionError(13, "Permission denied", "/root/.triton"), "set TRITON_CACHE_DIR to a writable folder"),
        (OSError(30, "Read-only file system"), "set TRITON_CACHE_DIR to a writable folder"),
        (ImportError("launcher.so: failed to map segment"), "a folder that may hold programs"),
        (RuntimeError("0 active drivers ([]). There should only be one.\nmore"), "RuntimeError: 0 active drivers"),
        (ValueError(), "ValueError: ValueError"),
        (wrapped(RuntimeError("No working C++ compiler found in torch._inductor.config")), "apt-get install gcc"),
        (RuntimeError("torch.compiler.disable was called"), "RuntimeError: torch.compiler.disable"),
    ],
)
def test_a_failure_is_reported_with_its_remedy(error, remedy):
    reason = fails(error)
    assert reason is not None and remedy in reason and "\n" not in reason


def test_a_failure_names_the_folder_of_the_trial():
    reason = failure_of(Mock(side_effect=PermissionError(13, "Permission denied")), "TORCHINDUCTOR_CACHE_DIR")
    assert reason is not None and reason.startswith("set TORCHINDUCTOR_CACHE_DIR to a writable folder")


def test_a_wrong_result_is_a_failure():
    assert failure_of(lambda: False) == "a first small kernel returned a wrong result"
    assert failure_of(lambda: True) is None


def test_a_gpu_that_failed_is_no_missing_kernel():
    with pytest.raises(torch.AcceleratorError):
        fails(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(torch.OutOfMemoryError):
        fails(torch.OutOfMemoryError("CUDA out of memory"))


def in_new_process(code: str, **environment: str) -> str:
    """Run code in a new process, without the interpreter of Triton unless asked for."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "import torch\nfrom openm6.kernels.probe import *\n" + code],
        env={**kept, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_launch_is_real():
    """Without a GPU it fails with Triton's own words; in the interpreter it succeeds on the CPU."""
    need_triton()
    launch = "print(kernel_failure(torch.device('cpu')))"
    assert in_new_process(launch, TRITON_INTERPRET="1") == "None"
    if not torch.cuda.is_available():
        assert in_new_process(launch).startswith("RuntimeError: 0 active drivers")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(probe, "INSTALLED", False)
    assert kernel_failure(GPU).startswith("Triton is not installed")


@pytest.mark.slow
def test_a_missing_compiler_is_found_by_trying(tmp_path):
    """That it works where there is one is shown by every test that compiles blocks."""
    ask = "print(compile_failure(torch.device('cpu')))"
    new = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "/no/compiler"}
    assert in_new_process(ask, **new).startswith("install a C compiler")


def test_a_gpu_without_kernels_is_not_compiled_for(monkeypatch):
    found = Capabilities(GPU, "Tesla T4", (7, 5), False, "Triton is not installed")
    monkeypatch.setattr(probe, "capabilities", lambda device: found)
    compile_failure.cache_clear()
    assert compile_failure(GPU) == "Triton is not installed"
    compile_failure.cache_clear()


def test_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    probe.use_writable_cache()
    assert CACHE not in os.environ
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    own = tmp_path / f"openm6-triton-{os.getuid()}"
    for _ in range(2):
        monkeypatch.delenv(CACHE, raising=False)
        probe.use_writable_cache()
        assert os.environ[CACHE] == str(own) and own.stat().st_mode & 0o777 == 0o700
    # Of another user, who could put programs there.
    own.rmdir()
    (tmp_path / "theirs").mkdir(0o700)
    own.symlink_to(tmp_path / "theirs")
    monkeypatch.delenv(CACHE)
    probe.use_writable_cache()
    assert Path(os.environ[CACHE]).resolve() not in (own, own.resolve())
    assert Path(os.environ[CACHE]).stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(CACHE, "/chosen")
    probe.use_writable_cache()
    assert os.environ[CACHE] == "/chosen"


def test_without_any_folder_that_can_be_written(monkeypatch, tmp_path):
    """Neither the home nor one for temporary files, as in a container that is read-only."""
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(probe, "INSTALLED", True)
    nowhere = Mock(side_effect=FileNotFoundError(2, "No usable temporary directory found"))
    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    compile_failure.cache_clear()
    for reason in (kernel_failure(CPU), compile_failure(CPU)):
        assert reason is not None and "No usable temporary directory found" in reason
    compile_failure.cache_clear()


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            Capabilities(GPU, "NVIDIA H100", (9, 0), True, None),
            "device cuda:0 (NVIDIA H100, compute capability 9.0): bf16; Triton kernels",
        ),
        (
            Capabilities(GPU, "Tesla T4", (7, 5), False, "Triton is not installed"),
            "device cuda:0 (Tesla T4, compute capability 7.5): no bf16, which needs compute capability 8.0; "
            "no Triton kernels, so slower: Triton is not installed",
        ),
    ],
)
def test_the_line_of_the_log(found, line):
    assert str(found) == line


def test_a_processor():
    found = capabilities(CPU)
    assert found.capability is None and found.no_kernels and str(found).startswith("device cpu (")


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    def broken(*words, **named):
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(torch, "zeros", broken)
    with pytest.raises(ConfigError, match="driver on your system is too old.*use --device cpu"):
        capabilities(torch.device("cuda", 7))
