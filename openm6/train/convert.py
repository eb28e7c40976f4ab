"""`openm6 convert`: a checkpoint in another precision, or taken from the pseudo stage to the real one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from openm6.checkpoint.folder import SEPARATOR, latest, list_checkpoints, read_state
from openm6.checkpoint.load import load_training_tensors
from openm6.checkpoint.optimizer import Moments, moment_factor
from openm6.checkpoint.reader import CheckpointReader
from openm6.checkpoint.save import Shard, Snapshot, save
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.files import replace_text
from openm6.core.run_folder import RunFolder
from openm6.core.seeds import derive_seed
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig, Stage
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE, CheckpointConfig, read_description
from openm6.offload.weight_store import RecordLayout, matrix_shapes
from openm6.optim.config import PRECISIONS, OptimizerConfig, WeightPrecision
from openm6.optim.rules import OptimizerState, Slots, UpdateRule, update_rule
from openm6.train.offloaded import full_name

WRITTEN_AGAIN = ("format", "openm6", "step", "files")  # of state.json


@dataclass(frozen=True)
class Conversion:
    """From what to what: rules, and the groups of layers."""

    description: CheckpointConfig
    old_precision: WeightPrecision
    new_precision: WeightPrecision
    delinked: bool
    moments: Moments

    @property
    def backbone(self) -> BackboneConfig:
        """The backbone of the result."""
        old = self.description.backbone
        return old.model_copy(update={"sharing": None}) if self.delinked else old

    @property
    def sources(self) -> list[int]:
        """New group of layers -> the old one that it comes from."""
        old = self.description.backbone
        return list(old.layer_groups) if self.delinked else list(range(len(old.group_layers)))


def convert(
    trained: Path,
    out: Path,
    precision: str | None = None,
    stage: Stage | None = None,
    moments: Moments = "independent",
) -> str:
    """Write the newest checkpoint of `trained` into a new run at `out`, which `openm6 train --resume` continues.

    Weights of a lower precision are rounded stochastically. The optimizer's moments are kept as far as the new rule
    stores them.

    Raises:
        CheckpointError: nothing to convert, or it is not of a multimodal model.
        ConfigError: the result would be of no known kind, or `out` already holds a run.
    """
    folder = latest(trained)
    state = read_state(folder)
    conversion = plan_conversion(folder, state, precision, stage, moments)
    if list_checkpoints(RunFolder(out).checkpoints):
        raise ConfigError(f"{out} already holds a run: choose another folder")
    run = RunFolder.open(out)
    _write_settings(RunFolder(folder.parents[1]), run, conversion)
    texts = {MODEL_FILE: _description_text(conversion), TOKENIZER_FILE: _text(folder / TOKENIZER_FILE)}
    replace_text(run.path / TOKENIZER_FILE, texts[TOKENIZER_FILE])
    weights, kept = CheckpointReader(folder, "model"), CheckpointReader(folder, "optimizer")
    snapshot = Snapshot(
        step=int(state["step"]),
        model=nn.Module(),
        weights=dict(_others(weights, conversion, scaled=False)),
        optimizer=dict(_others(kept, conversion, scaled=True)),
        state=_new_state(state, conversion),
        training=load_training_tensors(folder),
        files=texts,
        shards=_groups(weights, kept, conversion),
        num_shards=len(conversion.sources),
    )
    saved = save(snapshot, run.checkpoints, keep=1)
    kind = f"precision {conversion.new_precision}, {conversion.backbone.stage} stage"
    return f"{saved}: {kind}; go on with openm6 train {run.config} --resume --out {out}"


def plan_conversion(
    folder: Path, state: dict[str, Any], precision: str | None, stage: Stage | None, moments: Moments
) -> Conversion:
    """What is to be done, checked.

    Raises:
        CheckpointError, ConfigError: as for `convert`.
    """
    description = read_description(_text(folder / MODEL_FILE), str(folder / MODEL_FILE))
    old = state["precision"]
    new = precision or old
    if new not in PRECISIONS:
        raise ConfigError(f"--precision {new} must be one of {', '.join(PRECISIONS)}")
    if state.get("optimizer", "adamw") != "adamw" and new != "fp32":
        raise ConfigError(
            f"{folder} was trained with {state['optimizer']}, whose state Adafactor cannot use: convert a run of adamw"
        )
    now = description.backbone.stage
    if stage == "pseudo" and now == "real":
        raise ConfigError(f"{folder} is of the real stage: layers with weights of their own cannot share weights again")
    return Conversion(description, old, cast(WeightPrecision, new), stage == "real" and now == "pseudo", moments)


def _groups(weights: CheckpointReader, kept: CheckpointReader, conversion: Conversion) -> Iterator[Shard]:
    """The new groups of layers, one in memory at a time."""
    old_rule, new_rule = (
        update_rule(OptimizerConfig(precision=precision))
        for precision in (conversion.old_precision, conversion.new_precision)
    )
    old_layers, new_layers = (c.group_layers for c in (conversion.description.backbone, conversion.backbone))
    with torch.device("meta"):
        blocks = Backbone(conversion.description.backbone).group_blocks
    uses = Counter(conversion.sources)
    for group, source in enumerate(conversion.sources):
        shapes = matrix_shapes(blocks[source])
        prefix = f"backbone.layers.{old_layers[source]}"
        old = _read_group(RecordLayout(shapes, old_rule), old_rule, weights, kept, prefix)
        new = RecordLayout(shapes, new_rule)
        views = new.views(torch.zeros(new.num_bytes, dtype=torch.uint8))
        shard = Shard({}, {})
        for name, stored in views.items():
            state = _inherited(old_rule.export_state(old[name]), uses[source], conversion.moments)
            new_rule.import_state(stored, state, derive_seed(0, "convert", group, name))
            for slot, tensor in stored.items():
                full = full_name(f"backbone.layers.{new_layers[group]}.{name}", slot)
                (shard.model if slot in new_rule.read_slots else shard.optimizer)[full] = tensor
        yield shard


def _read_group(
    layout: RecordLayout, rule: UpdateRule, weights: CheckpointReader, kept: CheckpointReader, prefix: str
) -> dict[str, Slots]:
    """One group as it was saved; what the optimizer had not kept yet is zero."""
    views = layout.views(torch.zeros(layout.num_bytes, dtype=torch.uint8))
    for name, stored in views.items():
        for slot, tensor in stored.items():
            full = full_name(f"{prefix}.{name}", slot)
            if slot in rule.read_slots:
                weights.read_into(full, tensor)
            elif full in kept:
                kept.read_into(full, tensor)
    return views


def _inherited(state: OptimizerState, uses: int, moments: Moments) -> OptimizerState:
    """A layer's part of the state that `uses` layers shared."""
    if uses == 1:
        return state
    if moments == "reset":
        return OptimizerState(state.values, None, None, torch.zeros_like(state.count))
    first, second = (
        None if moment is None else moment * moment_factor(key, uses, moments)
        for key, moment in (("exp_avg", state.first), ("exp_avg_sq", state.second))
    )
    return OptimizerState(state.values, first, second, state.count)


def _others(reader: CheckpointReader, conversion: Conversion, scaled: bool) -> Iterator[tuple[str, Tensor]]:
    """All tensors but the matrices of layers; routers that layers no longer share once for each."""
    old = conversion.description.backbone
    with torch.device("meta"):
        blocks = Backbone(old).group_blocks
    prefixes = [f"backbone.layers.{layer}." for layer in old.group_layers]
    matrices = {prefix + name for prefix, block in zip(prefixes, blocks, strict=True) for name in block.matrices()}
    routers = {f"{prefix}mlp.router.": group for group, prefix in enumerate(prefixes) if old.share_routers}
    for full in reader.names:
        name, separator, key = full.partition(SEPARATOR)
        start, router, leaf = name.rpartition("mlp.router.")
        group = routers.get(start + router) if conversion.delinked else None
        if name in matrices:
            continue
        if group is None:
            yield full, reader.read(full)
            continue
        uses = conversion.sources.count(group)
        if scaled and conversion.moments == "reset" and uses > 1:
            continue
        factor = moment_factor(key, uses, conversion.moments) if scaled else 1.0
        for layer, source in enumerate(conversion.sources):
            if source == group:
                yield f"backbone.layers.{layer}.mlp.router.{leaf}{separator}{key}", reader.read(full) * factor


def _new_state(state: dict[str, Any], conversion: Conversion) -> dict[str, Any]:
    kept = {name: value for name, value in state.items() if name not in WRITTEN_AGAIN}
    if conversion.delinked:
        kept["callbacks"] = {name: value for name, value in kept.get("callbacks", {}).items() if name != "stages"}
    return {**kept, "stage": conversion.backbone.stage, "precision": conversion.new_precision}


def _write_settings(old: RunFolder, new: RunFolder, conversion: Conversion) -> None:
    """The old run's settings with what has changed, where it had any."""
    values = old.read_config()
    if not values:
        return
    loop = dict(values.get("loop") or {})
    loop["optimizer"] = {**(loop.get("optimizer") or {}), "precision": conversion.new_precision}
    if conversion.delinked:
        loop.pop("stages", None)
        model = dict(values.get("model") or {})
        values["model"] = {**model, "overrides": {**(model.get("overrides") or {}), "sharing": None}}
    new.write_config({**values, "loop": loop})


def _description_text(conversion: Conversion) -> str:
    return conversion.description.model_copy(update={"backbone": conversion.backbone}).to_json()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: it is not a checkpoint of a multimodal model"
        ) from None
