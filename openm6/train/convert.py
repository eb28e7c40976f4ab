"""`openm6 convert`: a checkpoint in another precision, or taken from the pseudo stage to the real one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openm6.checkpoint.folder import PREDICTORS_FILE, SEPARATOR, latest, list_checkpoints, read_state
from openm6.checkpoint.load import load_training_tensors
from openm6.checkpoint.optimizer import Moments, delink_moments, moment_factor
from openm6.checkpoint.reader import CheckpointReader
from openm6.checkpoint.save import Shard, Snapshot, save
from openm6.core.errors import ConfigError
from openm6.core.files import replace_text
from openm6.core.run_folder import RunFolder
from openm6.core.seeds import derive_seed
from openm6.inference.load import read_texts
from openm6.models.backbone import Backbone
from openm6.models.config import Stage
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE, read_description
from openm6.offload.weight_store import RecordLayout, matrix_shapes
from openm6.optim.config import PRECISIONS, OptimizerConfig
from openm6.optim.rules import OptimizerState, Shape, Slots, UpdateRule, update_rule
from openm6.train.offloaded import full_name
from openm6.train.start import START_FILE

WRITTEN_AGAIN = ("format", "openm6", "step", "files")  # of state.json


class Conversion:
    """From what to what: update rules, and groups of layers."""

    def __init__(
        self, folder: Path, state: dict[str, Any], precision: str | None, stage: Stage | None, moments: Moments
    ) -> None:
        self.description, self.tokenizer = read_texts(folder)
        self.old, self.moments, self.precision = self.description.backbone, moments, precision or state["precision"]
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision {self.precision} must be one of {', '.join(PRECISIONS)}")
        if (optimizer := state.get("optimizer", "adamw")) != "adamw":
            raise ConfigError(
                f"{folder} was trained with {optimizer}, whose state cannot be converted: convert a run of adamw, or, "
                "for the real stage, set loop.stages and go on with --resume"
            )
        if self.precision != "fp32" and self.old.modality_experts:
            raise ConfigError(f"{folder} has modality experts, which are trained in fp32 alone: leave --precision out")
        if stage == "pseudo" and self.old.stage == "real":
            raise ConfigError(
                f"{folder} is of the real stage: layers with weights of their own cannot share weights again"
            )
        self.delinked = stage == "real" and self.old.stage == "pseudo"
        self.new = self.old.model_copy(update={"sharing": None}) if self.delinked else self.old
        # New group of layers -> the old one that it comes from.
        self.sources = self.old.layer_groups if self.delinked else tuple(range(len(self.old.group_layers)))
        self.old_rule, self.new_rule = (
            update_rule(OptimizerConfig(precision=name)) for name in (state["precision"], self.precision)
        )
        if any(folder.glob("shard-*.safetensors")):
            raise ConfigError(
                f"{folder} is in shards, one for each rank: resume the run with one process, and convert its next "
                "checkpoint"
            )
        self.weights = CheckpointReader(folder, "model")
        # An imported decoder has no moments yet.
        has_moments = any(folder.glob("optimizer*.safetensors"))
        self.kept = CheckpointReader(folder, "optimizer") if has_moments else None
        # Those with optimizer state, which a frozen one never has; empty: none has any yet.
        self.trained = {name.partition(SEPARATOR)[0] for name in self.kept.names} if self.kept is not None else set()
        with torch.device("meta"):
            self.blocks = Backbone(self.old).group_blocks

    def groups(self) -> Iterator[Shard]:
        """The new groups of layers, one in memory at a time."""
        for group, source in enumerate(self.sources):
            shapes, shard = matrix_shapes(self.blocks[source]), Shard({}, {})
            before, after = _empty_group(shapes, self.old_rule), _empty_group(shapes, self.new_rule)
            for name, stored in after.items():
                old_name = f"backbone.layers.{self.old.group_layers[source]}.{name}"
                new_name = f"backbone.layers.{self.new.group_layers[group]}.{name}"
                self._read(old_name, before[name])
                state = self._inherited(self.old_rule.export_state(before[name]), self.sources.count(source))
                self.new_rule.import_state(stored, state, derive_seed(0, "convert", group, name))
                for slot, tensor in stored.items():
                    if slot in self.new_rule.read_slots:
                        shard.model[full_name(new_name, slot)] = tensor
                    elif not self.trained or old_name in self.trained:
                        shard.optimizer[full_name(new_name, slot)] = tensor
            yield shard

    def _read(self, name: str, stored: Slots) -> None:
        """One matrix as it was saved; what the optimizer had not kept yet stays zero."""
        for slot, tensor in stored.items():
            full = full_name(name, slot)
            if slot in self.old_rule.read_slots:
                self.weights.read_into(full, tensor)
            elif self.kept is not None and full in self.kept:
                self.kept.read_into(full, tensor)

    def _inherited(self, state: OptimizerState, uses: int) -> OptimizerState:
        """A layer's part of the state that `uses` layers shared."""
        if uses == 1:
            return state
        if self.moments == "reset":
            return OptimizerState(state.values, None, None, torch.zeros_like(state.count))
        first, second = (
            None if moment is None else moment * moment_factor(key, uses, self.moments)
            for key, moment in (("exp_avg", state.first), ("exp_avg_sq", state.second))
        )
        return OptimizerState(state.values, first, second, state.count)

    def others(self, reader: CheckpointReader, moments: Moments) -> dict[str, Tensor]:
        """All tensors but the matrices of layers; routers that layers no longer share once for each."""
        prefixes = [f"backbone.layers.{layer}." for layer in self.old.group_layers]
        pairs = zip(prefixes, self.blocks, strict=True)
        matrices = {prefix + name for prefix, block in pairs for name in block.matrices()}
        found = {name: reader.read(name) for name in reader.names if name.partition(SEPARATOR)[0] not in matrices}
        if not (self.delinked and self.old.share_routers):
            return found
        routers = {
            f"backbone.layers.{layer}.mlp.router.{leaf}": f"{prefixes[source]}mlp.router.{leaf}"
            for layer, source in enumerate(self.sources)
            for leaf in ("weight", "bias")
        }
        return delink_moments(found, routers, moments)

    def changed(self, values: dict[str, Any]) -> dict[str, Any]:
        loop, model = (dict(values.get(name) or {}) for name in ("loop", "model"))
        loop["optimizer"] = {**(loop.get("optimizer") or {}), "precision": self.precision}
        if self.precision != "fp32":  # weights are offloaded then, by one process
            loop.pop("num_processes", None)
        if not self.delinked:
            return {**values, "loop": loop}
        loop.pop("stages", None)
        if not model.get("start"):  # the shape of a start is in START_FILE
            model["overrides"] = {**(model.get("overrides") or {}), "sharing": None}
        return {**values, "loop": loop, "model": model}


def convert(
    trained: Path, out: Path, precision: str | None = None, stage: Stage | None = None, moments: Moments = "independent"
) -> str:
    """Write the newest checkpoint of `trained` into a new run at `out`, which `openm6 train --resume` continues.

    Weights of a lower precision are rounded stochastically. The optimizer's moments are kept as far as the new rule
    stores them. CheckpointError: there is nothing to convert; ConfigError: no known result, or `out` holds a run.
    """
    folder = latest(trained)
    state = read_state(folder)
    conversion = Conversion(folder, state, precision, stage, moments)
    if list_checkpoints(RunFolder(out).checkpoints):
        raise ConfigError(f"{out} already holds a run: choose another folder")
    run = RunFolder.open(out)
    parent = folder.resolve().parent
    # The settings of a checkpoint that was copied from its run are not known.
    before = RunFolder(parent.parent if parent.name == "checkpoints" else folder)
    if settings := before.read_config():
        run.write_config(conversion.changed(settings))
    if (kept := before.path / START_FILE).is_file():
        start = read_description(kept.read_text(encoding="utf-8"), str(kept))
        if conversion.delinked:
            start = start.model_copy(update={"backbone": start.backbone.model_copy(update={"sharing": None})})
        replace_text(run.path / START_FILE, start.to_json())
    description = conversion.description.model_copy(update={"backbone": conversion.new})
    files: dict[str, str | bytes] = {MODEL_FILE: description.to_json(), TOKENIZER_FILE: conversion.tokenizer}
    replace_text(run.path / TOKENIZER_FILE, conversion.tokenizer)
    if (folder / PREDICTORS_FILE).is_file():
        files[PREDICTORS_FILE] = (folder / PREDICTORS_FILE).read_bytes()
    new_state = {name: value for name, value in state.items() if name not in WRITTEN_AGAIN}
    if conversion.delinked:
        new_state["callbacks"] = {name: one for name, one in state.get("callbacks", {}).items() if name != "stages"}
    new_state |= {"stage": conversion.new.stage, "precision": conversion.precision}
    weights = conversion.others(conversion.weights, "independent")
    optimizer = {} if conversion.kept is None else conversion.others(conversion.kept, moments)
    snapshot = Snapshot(
        int(state["step"]), nn.Module(), optimizer, new_state, load_training_tensors(folder), files,
        conversion.groups(), len(conversion.sources), weights=weights,
    )  # fmt: skip
    saved = save(snapshot, run.checkpoints, keep=1)
    kind = f"precision {conversion.precision}, {conversion.new.stage} stage"
    if "progress" not in state:
        return f"{saved}: {kind}; train it by a recipe with model: {{start: {out}}}"
    return f"{saved}: {kind}; go on with openm6 train {run.config if settings else 'RECIPE'} --resume --out {out}"


def _empty_group(shapes: dict[str, Shape], rule: UpdateRule) -> dict[str, Slots]:
    layout = RecordLayout(shapes, rule)
    return layout.views(torch.zeros(layout.num_bytes, dtype=torch.uint8))
