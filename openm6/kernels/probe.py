"""What this process's device can do: tried once, and reported in one line."""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import platform
import re
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from openm6.core.errors import ConfigError, first_line

BF16_CAPABILITY = (8, 0)  # from which on tensor cores multiply bf16
INSTALLED = importlib.util.find_spec("triton") is not None  # searches for the package without importing it
CACHE = "TRITON_CACHE_DIR"  # by default a folder in the home
COMPILER = "install a C compiler and the headers of Python (Debian: apt-get install gcc libc6-dev python3-dev)"


@dataclass(frozen=True)
class Capabilities:
    """What a device can do.

    name: of the GPU or the processor; capability: of a GPU, such as (9, 0); bf16: whether products in bf16 are fast;
    no_kernels: why Triton kernels do not run on it, None if they do.
    """

    device: torch.device
    name: str
    capability: tuple[int, int] | None
    bf16: bool
    no_kernels: str | None

    def __str__(self) -> str:
        """One line: what is used, and why not more."""
        if self.capability is None:
            return f"device {self.device} ({self.name})"
        number = ".".join(map(str, self.capability))
        bf16 = "bf16" if self.bf16 else "no bf16, which needs compute capability 8.0"
        kernels = "Triton kernels" if self.no_kernels is None else f"no Triton kernels, so slower: {self.no_kernels}"
        return f"device {self.device} ({self.name}, compute capability {number}): {bf16}; {kernels}"


@functools.cache
def capabilities(device: torch.device) -> Capabilities:
    """Find out what a device can do; the first call launches a kernel on a GPU. ConfigError: torch cannot use it."""
    if device.type != "cuda":
        name = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        return Capabilities(device, name, None, False, f"they need a GPU, and this is {device.type}")
    try:
        torch.zeros(1, device=device).item()
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    except RuntimeError as error:  # a driver that is too old, a GPU in exclusive use, a fatal error before
        raise ConfigError(
            f"the GPU {device} cannot be used ({first_line(error)}): check nvidia-smi, or use --device cpu"
        ) from error
    return Capabilities(device, name, capability, capability >= BF16_CAPABILITY, kernel_failure(device))


def kernel_failure(device: torch.device) -> str | None:
    """Launch a kernel and check its result; return why that does not work, None if it does."""
    if not INSTALLED:
        return "Triton is not installed (pip install triton; there is none for Windows)"
    return failure_of(functools.partial(_check_kernel, device))


@functools.cache
def compile_failure(device: torch.device) -> str | None:
    """Compile a small function with its gradient, which takes seconds on a GPU; return why that fails, None if not."""
    if device.type == "cuda" and (reason := capabilities(device).no_kernels):
        return reason  # the compiler writes Triton kernels
    return failure_of(functools.partial(_check_compiler, device))


def failure_of(trial: Callable[[], bool], cache: str = CACHE) -> str | None:
    """Run a trial that returns whether it is right; return why not, and the remedy; raise if memory or GPU fails.

    cache: the variable that names the folder of what it compiles
    """
    try:
        return None if trial() else "a first small kernel returned a wrong result"
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # What the compiler raises is wrapped in exceptions of torch.
        cause: BaseException = error
        while (inner := getattr(cause, "inner_exception", None) or cause.__cause__) is not None:
            cause = inner
        if isinstance(cause, subprocess.CalledProcessError) or re.search(r"\bc(\+\+)? compiler", str(cause).lower()):
            return f"{COMPILER}; the error was: {first_line(cause)}"
        if isinstance(cause, OSError) and cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC):
            return f"set {cache} to a writable folder; the error was: {first_line(cause)}"
        if isinstance(cause, ImportError):  # a library on a file system mounted without `exec`
            return f"set {cache} to a folder that may hold programs; the error was: {first_line(cause)}"
        return f"{type(cause).__name__}: {first_line(cause)}"


def use_writable_cache() -> None:
    """Keep Triton's compiled code in the temporary folder where the home cannot be written."""
    home = Path(os.path.expanduser("~"))
    # Unlike Path.exists, it raises nothing for a home that may not be entered.
    there = next(path for path in (home / ".triton", home, *home.parents) if os.path.exists(path))
    if CACHE not in os.environ and not os.access(there, os.W_OK | os.X_OK):
        os.environ[CACHE] = _own_folder()


def _own_folder() -> str:
    """A folder for temporary files of this user alone: what lies there is executed."""
    user = getattr(os, "getuid", int)()
    folder = Path(tempfile.gettempdir()) / f"openm6-triton-{user}"
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == user and stat.S_IMODE(found.st_mode) == 0o700
    return str(folder) if is_own else tempfile.mkdtemp(prefix="openm6-triton-")


def _check_kernel(device: torch.device) -> bool:
    use_writable_cache()
    # Triton is optional.
    from openm6.kernels.cross_entropy import cross_entropy_with_gradient  # noqa: PLC0415

    logits = torch.arange(8.0, device=device).view(2, 4)
    label, weight = torch.tensor([1, 2], device=device), torch.ones(2, device=device)
    expected = F.cross_entropy(logits, label, reduction="none")
    return torch.allclose(cross_entropy_with_gradient(logits.clone(), label, weight), expected, rtol=1e-4)


def _check_compiler(device: torch.device) -> bool:
    use_writable_cache()

    def gate(x: torch.Tensor) -> torch.Tensor:
        return (F.silu(x) * x).sum()

    x = torch.linspace(-1, 1, 64, device=device, requires_grad=True)
    (compiled,) = torch.autograd.grad(torch.compile(gate, fullgraph=True)(x), x)
    (expected,) = torch.autograd.grad(gate(x), x)
    return torch.allclose(compiled, expected, rtol=1e-4)
