"""OpenM6: a sparse mixture-of-experts transformer with text, images, audio and numbers as inputs and outputs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from openm6.core.errors import OpenM6Error

if TYPE_CHECKING:
    from openm6.api.estimators import OpenM6Classifier, OpenM6Regressor, finetune
    from openm6.api.model import OpenM6, from_hf, load
    from openm6.api.values import Audio, Distribution

__version__ = "0.2.0.dev0"
__all__ = [
    "Audio", "Distribution", "OpenM6", "OpenM6Classifier", "OpenM6Error", "OpenM6Regressor", "finetune", "from_hf",
    "load",
]  # fmt: skip
# The first import of torch takes seconds, that of scikit-learn one.
_MODULES = {"Audio": "values", "Distribution": "values"} | dict.fromkeys(
    ("OpenM6Classifier", "OpenM6Regressor", "finetune"), "estimators"
)


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'openm6' has no attribute {name!r}")
    return getattr(import_module(f"openm6.api.{_MODULES.get(name, 'model')}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]
