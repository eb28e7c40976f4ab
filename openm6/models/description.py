"""Everything besides weights and tokenizer that rebuilds a model: model.json in each checkpoint."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

from openm6.core.config import Config, build
from openm6.core.errors import CheckpointError, ConfigError
from openm6.modalities.numbers import Numbers
from openm6.modalities.pool import PoolConfig
from openm6.modalities.registry import Modalities, ModalitiesConfig, build_modalities
from openm6.modalities.regression import FittedRidges
from openm6.modalities.series import SeriesStats
from openm6.modalities.simple_predictors import TablePredictors
from openm6.modalities.text import read_tokenizer
from openm6.models.config import BackboneConfig
from openm6.models.omni import Omni

MODEL_FILE, TOKENIZER_FILE = "model.json", "tokenizer.json"
FORMAT = 1


class TrainedTask(Config):
    """One thing the model was trained on: a task over a source.

    `words` are the minimum and maximum words of its input texts, None if unknown; `modalities` those of a chat;
    `of_start`: in the run that this one started from alone; `weight`: in the mixture; `columns`: predicted numbers.
    """

    task: str
    source: str
    words: tuple[int, int] | None = None
    modalities: list[str] = []
    of_start: bool = False
    weight: float = 1.0
    columns: list[str] = []


class CheckpointConfig(Config):
    """Sizes, modalities, the scales of number columns, what is known of series, and the trained tasks."""

    format: int = FORMAT
    preset: str = ""
    base_model: str = ""  # what its text was imported from
    backbone: BackboneConfig
    modalities: ModalitiesConfig
    external: dict[str, str] = {}  # sha256 of the weights of its frozen codecs and encoders, by setting
    scales: dict[str, tuple[float, float]]
    series: dict[str, SeriesStats] = {}
    ridges: dict[str, tuple[str, str]] = {}  # of series, as text
    widths: dict[str, dict[str, float]] = {}  # of predicted distributions, by kind and column; weights of labels
    trained_tasks: list[TrainedTask]
    tasks: dict[str, Any] = {}  # own ones among them, as in the recipe
    embedding: PoolConfig | None = None  # None: no trained task makes embeddings
    sources: dict[str, Any] = {}  # where the records came from, as in the recipe
    eval: dict[str, Any] = {}  # how to evaluate it, as in the recipe

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, indent=1)

    def to_publish(self) -> Self:
        """Return it without low-rank adapters, which are merged, and without folders of this machine."""

        def bare(value: Any) -> Any:
            return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

        sources = {key: {name: bare(value) for name, value in one.items()} for key, one in self.sources.items()}
        backbone = self.backbone.model_copy(update={"lora": None})
        return self.model_copy(update={"backbone": backbone, "sources": sources, "base_model": bare(self.base_model)})

    def refuse_local(self) -> None:
        """Raise ConfigError if an encoder or a codec of it is of this machine alone."""
        for name, setting in itertools.product(("image", "audio"), ("encoder", "codec")):
            value = getattr(getattr(self.modalities, name), setting) or ""
            library, colon, inner = value.partition(":")
            here = "/" in value or (not colon and Path(value).is_file())
            if library == "transformers":
                here = Path(inner).is_dir() or inner.startswith(("/", ".", "~"))
            if here:
                raise ConfigError(
                    f"modalities.{name}.{setting} is of this machine, {value}, and others do not have it: train with "
                    "one from transformers or the package"
                )


def read_description(text: str, where: str) -> CheckpointConfig:
    """The description in the text of a model.json; CheckpointError: it is not JSON, or of another version."""
    try:
        values = json.loads(text)
    except ValueError:
        raise CheckpointError(f"{where} is damaged: use another checkpoint") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not a model description of format {FORMAT}: it is from another version")
    return build(CheckpointConfig, values, where)


def check_external(description: CheckpointConfig, modalities: Modalities) -> None:
    """Raise CheckpointError if a codec or an encoder has other weights than in the training."""
    if other := [name for name, found in description.external.items() if modalities.external.get(name) != found]:
        raise CheckpointError(f"modalities.{other[0]} has other weights than in the training: use that version of it")


def build_model(
    description: CheckpointConfig,
    tokenizer: str,
    where: str,
    meta_matrices: bool = False,
    predictors: Sequence[TablePredictors] = (),
) -> tuple[Omni, Modalities]:
    """A model with fresh weights, and its modalities, see `Backbone` and `Numbers`; CheckpointError: wrong encoder."""
    tokens = read_tokenizer(tokenizer, where)
    modalities = build_modalities(description.modalities, tokens, description.scales)
    check_external(description, modalities)
    numbers = cast(Numbers, modalities["numbers"])
    numbers.series, numbers.predictors = description.series, predictors
    numbers.ridges = {name: FittedRidges.of_texts(texts) for name, texts in description.ridges.items()}
    numbers.widths = description.widths
    fields = [source.get("fields") or {} for source in description.sources.values()]
    dates = {column: form for one in fields for column, form in (one.get("dates") or {}).items()}
    # A column may hold numbers in another source.
    numbers.dates = {column: form for column, form in dates.items() if column not in description.scales}
    return Omni(description.backbone, modalities, description.embedding, meta_matrices), modalities
