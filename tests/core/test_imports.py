"""The lowest layer and the command line's help load without torch, and a model without torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = "import sys; print([name for name in ('pydantic', 'torch', 'transformers') if name in sys.modules])"


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import openm6, openm6.train, openm6.models, openm6.data", []),
        ("import openm6.cli.main", []),
        (
            "import openm6.core.run_folder, openm6.core.seeds, openm6.core.log, openm6.core.files",
            ["pydantic"],
        ),
        ("import openm6.models.presets", ["pydantic"]),
    ],
)
def test_imports_stay_light(statement: str, heavy: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", f"{statement}; {LOADED}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(heavy)


def test_a_model_that_is_not_compiled_needs_no_compiler() -> None:
    statement = "import sys, openm6.train.run, openm6.inference.load; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
