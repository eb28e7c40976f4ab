"""What can be said of a checkpoint without loading its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openm6.checkpoint.folder import STATE_FILE
from openm6.core.errors import CheckpointError
from openm6.inference.load import check
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE
from tests.small_model import loaded


def test_a_checkpoint_is_looked_at_without_its_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run or checkpoint"):
        check(tmp_path / "nowhere")
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / STATE_FILE).write_text(json.dumps({"files": {}}))
    with pytest.raises(CheckpointError, match="not a checkpoint of a multimodal model"):
        check(folder)
    (folder / MODEL_FILE).write_text(loaded().description.to_json(), encoding="utf-8")
    (folder / TOKENIZER_FILE).write_text("{}")
    check(folder)  # there are no weights at all
