"""The table behind `openm6 presets`; apart from the tasks, which need torch."""

from __future__ import annotations

from rich.table import Table

from openm6.models.presets import PRESETS


def list_presets() -> Table:
    """One row per named size; parameters of the backbone and the word embedding."""
    table = Table("preset", "parameters", "active per token", "layers", "width", "what it is", box=None)
    for preset in PRESETS.values():
        total, active = in_short(preset.parameters.total), in_short(preset.parameters.active)
        layers, width = str(preset.backbone.num_layers), str(preset.backbone.width)
        table.add_row(preset.name, total, active, layers, width, preset.description)
    return table


def in_short(count: int) -> str:
    """A number of parameters as people say it: 4.1M, 10.07B, 1.003T."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return str(count)
