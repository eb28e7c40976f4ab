"""Fine-tuning: what a run takes over from the model that it starts from, and how its own data join that."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openm6.checkpoint.folder import PREDICTORS_FILE, latest, list_checkpoints
from openm6.checkpoint.load import load_placed, read_weight
from openm6.checkpoint.reader import CheckpointReader
from openm6.core.config import build
from openm6.core.errors import ConfigError, nearest
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.data.source import SourceConfig
from openm6.hub.find import find_model
from openm6.inference.load import read_texts
from openm6.modalities.interface import modality_of
from openm6.modalities.pool import POOL
from openm6.modalities.registry import MODALITIES, ModalitiesConfig
from openm6.modalities.simple_predictors import TablePredictors, from_bytes
from openm6.models.description import CheckpointConfig, TrainedTask, read_description
from openm6.models.omni import Omni
from openm6.tasks.registry import all_tasks
from openm6.train.recipe import MultimodalRecipe

START_FILE = "start.json"  # in the folder of a run: the description of its start, for resuming without it
# Settings of modalities that no weight depends on, or only those of what is generated: a run may set its own.
OWN_SETTINGS = ("max_tokens", "seconds", "max_seconds", "predictors", "min_patches", "max_patches", "max_pixels",
                "augmentation", "flips", "vary_speed", "codec_probability", "codec", "codebooks",
                "encoder")  # fmt: skip
FAR = 10.0  # scales that the values of a column may differ from those in the start without a warning


@dataclass(frozen=True)
class Start:
    """The model that a run starts from; there is no `checkpoint` once the run has one of its own."""

    description: CheckpointConfig
    tokenizer: str
    predictors: list[TablePredictors]
    checkpoint: Path | None

    def merge(self, own: CheckpointConfig) -> CheckpointConfig:
        """Return the description of the run's own data joined with the start's: what both have stays as it is there."""
        start, trained = self.description, {(one.task, one.source) for one in own.trained_tasks}
        scales = [(name, *own.scales[name], *start.scales[name]) for name in own.scales if name in start.scales]
        if far := [name for name, loc, scale, before, unit in scales
                   if abs(loc - before) > FAR * unit or not unit / FAR <= scale <= FAR * unit]:  # fmt: skip
            get_log().warning(
                f"columns {', '.join(map(repr, far))} have far other values than in the start, whose scales are kept: "
                "if they mean something else, give them other names"
            )
        before = [one for one in start.trained_tasks if (one.task, one.source) not in trained]
        codecs, encoders = self.with_new_codec(own.modalities), self.with_new_encoder(own.modalities)
        lost = [one for one in before if self._is_lost(one, set(codecs), set(encoders))]
        if lost:
            names = ", ".join(f"{one.task} of {one.source}" for one in lost)
            get_log().warning(
                f"the codec or the encoder is not that of the start, so these tasks are no longer trained: {names}; "
                "add those that are still needed to the mixture"
            )
        joined = {name: getattr(own, name) | getattr(start, name) for name in ("scales", "series", "tasks", "sources")}
        of_start = (one.model_copy(update={"of_start": True}) for one in before if one not in lost)
        joined["trained_tasks"] = [*own.trained_tasks, *of_start]
        joined["widths"] = {k: own.widths.get(k, {}) | found for k, found in (own.widths | start.widths).items()}
        kept = {name: getattr(start, name) for name in ("preset", "base_model")}
        other = {f"{name}.codec" for name in codecs} | {f"{name}.encoder" for name in encoders}
        external = {name: sha256 for name, sha256 in start.external.items() if name not in other}
        return own.model_copy(update=joined | kept | {"external": external})

    def _is_lost(self, trained: TrainedTask, generated: set[str], read: set[str]) -> bool:
        """Return whether a task generates with another codec, or reads with another encoder."""
        task = all_tasks(self.description.tasks).get(trained.task)
        if task is None:
            return False
        inputs = {*trained.modalities, *(slot.modality for slot in task.inputs.values())}
        if task.optional:  # a record need not have all of them
            fields = self.description.sources.get(trained.source, {}).get("fields") or {}
            inputs = {name for name in inputs if fields.get(name)}
        return task.output_modality in generated or not inputs.isdisjoint(read)

    def with_new_codec(self, chosen: ModalitiesConfig) -> list[str]:
        """Return the modalities that have another codec than in the start, so that generating them is learned again."""
        own = self.description.modalities
        changed = {
            "image": own.image.codec != chosen.image.codec,
            "audio": (own.audio.codec, own.audio.codebooks) != (chosen.audio.codec, chosen.audio.codebooks),
        }
        return [name for name, one in changed.items() if one]

    def with_new_encoder(self, chosen: ModalitiesConfig) -> list[str]:
        """Return the modalities that another encoder reads than in the start, so that its features are learned."""
        own = self.description.modalities
        return [name for name in ("image", "audio") if getattr(own, name).encoder != getattr(chosen, name).encoder]

    def unlike(self, chosen: ModalitiesConfig) -> list[str]:
        """Return the modalities that have other settings than in the start, so that no weights of it fit."""
        own = self.description.modalities
        return [name for name in _untrained(self.description) if getattr(own, name) != getattr(chosen, name)]

    def check_replaced(self, omni: Omni, chosen: ModalitiesConfig, targets: set[str], inputs: set[str]) -> None:
        """Raise ConfigError unless what another codec or encoder is for is trained, by modalities of tasks.

        An imported decoder read and generated nothing with them, so it loses nothing.
        """
        changed = (("codec", self.with_new_codec(chosen), "out", "output", targets),
                   ("encoder", self.with_new_encoder(chosen), "in", "input", inputs))  # fmt: skip
        for setting, names, kind, role, used in changed:
            for name in set(names) - set(self.unlike(chosen)):
                trains = any(one.requires_grad for one in omni.adapter(f"{name}_{kind}").parameters())
                if name not in used or not trains:
                    raise ConfigError(
                        f"modalities.{name}.{setting} is another one than in the start: add a task whose {role} is "
                        f"{name}, and leave {name}_{kind} out of model.freeze"
                    )

    def load_weights(self, omni: Omni, chosen: ModalitiesConfig, offloaded: bool) -> CheckpointReader | None:
        """Fill a model with the start's weights; return the reader of its layers' matrices if these stay on `meta`.

        Pool, adapters, modalities that the start lacks, and layers of another codec or encoder keep first weights.
        """
        if self.checkpoint is None:
            return None
        for block in omni.backbone.blocks if not offloaded else ():
            block.place_matrices("cpu")
        unread = tuple(f"adapters.{name}_" for name in self.unlike(chosen))
        unread += tuple(f"adapters.{name}_out." for name in self.with_new_codec(chosen))
        kept = set(self.with_new_encoder(chosen)) - {*self.unlike(chosen), *self.with_new_codec(chosen)}
        unread += tuple(f"adapters.{name}_in." for name in self.with_new_encoder(chosen))
        positions = tuple(f"adapters.{name}_out.place." for name in kept)
        new = (".lora.", ".modality_experts.", f"adapters.{POOL}.")
        reader = load_placed(self.checkpoint, omni, new, unread + positions)
        for key, target in omni.named_parameters(remove_duplicate=False):
            if key.startswith(positions):  # positions of generated codes, which patches without an encoder share
                read_weight(reader, key if key in reader else key.replace("_out.", "_in.", 1), target)
        return reader if offloaded else None


def open_start(recipe: MultimodalRecipe, run: RunFolder) -> Start | None:
    """Return the model that a recipe starts from, or what a run that has begun kept of it; None if it names none."""
    name, kept, begun = recipe.model.start, run.path / START_FILE, list_checkpoints(run.checkpoints)
    if name is None:
        return None
    resumes = bool(begun) and kept.is_file()
    found = begun[-1] if resumes else find_model(name)
    folder = latest(found)
    description, tokenizer = read_texts(folder)
    if resumes:
        description = read_description(kept.read_text(encoding="utf-8"), str(kept))
    description, names = _with_names_apart(description, recipe.sources)
    path = folder / PREDICTORS_FILE
    predictors = from_bytes(path.read_bytes(), str(path)) if path.is_file() else []
    for table in predictors:  # those that name no source are of any of the start, but of no new one
        table.sources = [names.get(name, name) for name in table.sources or names]
    return Start(description, tokenizer, predictors, None if resumes else folder)


def with_start(
    recipe: MultimodalRecipe, values: dict[str, Any], run: RunFolder
) -> tuple[MultimodalRecipe, dict[str, Any]]:
    """Return recipe and values with shape, modalities and replayed data of the start; ConfigError if they differ."""
    start, name = open_start(recipe, run), recipe.model.start
    if start is None:
        return recipe, values
    found, own = start.description, {key: task.model_dump(mode="json") for key, task in recipe.tasks.items()}
    if other := [key for key in own if found.tasks.get(key, own[key]) != own[key]]:
        raise ConfigError(f"task {other[0]!r} of this recipe is another one than that of {name}: rename it")
    if recipe.embedding is not None and found.embedding not in (None, recipe.embedding):
        raise ConfigError(f"embedding differs from that of {name}: leave it out")
    if recipe.replay:
        values = _with_replay(recipe, values, start)
        recipe = build(MultimodalRecipe, values, "the recipe with replayed data")
    before = found.backbone.modality_experts
    overrides = {**found.backbone.model_dump(), "lora": recipe.model.lora or found.backbone.lora}
    overrides["modality_experts"] = [*before, *(one for one in recipe.model.modality_experts if one not in before)]
    shape = {"preset": found.preset or recipe.model.preset, "overrides": overrides}
    chosen = {
        "model": recipe.model.model_copy(update=shape),
        "modalities": _modalities(recipe.modalities, found, str(name)),
        "embedding": found.embedding or recipe.embedding,
    }
    return recipe.model_copy(update=chosen), values


def freeze(omni: Omni, names: list[str], used: set[str]) -> None:
    """Exclude weights from training by modality, kind of token, `backbone`, `embeddings` or prefix; else ConfigError.

    `used`: the modalities of the mixture, for which something must be left to train.
    Beside modality experts or low-rank adapters, the rest of the backbone belongs to the text, and adapters freeze it.
    """
    groups, lora = _parts(omni), omni.config.lora
    for name in [*names, *(["text"] if lora is not None else [])]:
        prefixes = tuple(f"{prefix}." for prefix in groups.get(name, [name]))
        named = omni.named_parameters(remove_duplicate=False)  # positions are of what is read and of what is generated
        matching = ((key, one) for key, one in named if f"{key}.".startswith(prefixes))
        frozen = [one for key, one in matching if ".lora." not in key]
        if not frozen:
            hint = nearest(name, [*groups, "backbone.layers.0"])
            raise ConfigError(f"model.freeze names {name!r}, which no parameter's name begins with; {hint}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    left = [key.split(".") for key, parameter in omni.named_parameters() if parameter.requires_grad]
    if not any(key[0] == "backbone" or modality_of(key[1]) in used for key in left):
        raise ConfigError(f"model.freeze={names} leaves nothing to train: take a name out")


def _parts(omni: Omni) -> dict[str, list[str]]:
    """Named parts of a model, by prefixes of their parameters. Experts for one kind or modality alone belong to it."""
    numbers = range(len(omni.config.modality_experts))
    tokens = {
        number: {kind for kind in omni.adapters if number in omni.modality_experts_of(kind)} for number in numbers
    }
    groups: dict[str, list[str]] = {}
    for name in (*MODALITIES, *omni.adapters):
        kinds = {kind for kind in omni.adapters if name in (kind, modality_of(kind))}
        own = [f".modality_experts.{number}." for number, passing in tokens.items() if passing <= kinds]
        experts = [key for key, _ in omni.named_parameters() if any(part in key for part in own)]
        groups[name] = [*(f"adapters.{kind}" for kind in kinds), *experts]
    if omni.config.lora is not None or omni.config.modality_experts:
        shared = (key for key, _ in omni.backbone.named_parameters(prefix="backbone"))
        groups["text"] += [key for key in shared if ".modality_experts." not in key]
    return groups | {"backbone": ["backbone"], "embeddings": ["adapters.text.embedding"]}


def _with_names_apart(
    start: CheckpointConfig, sources: Mapping[str, SourceConfig]
) -> tuple[CheckpointConfig, dict[str, str]]:
    """The start's description with new names for its sources whose names a run gives to other data, and these names."""
    own = {name: config.model_dump(mode="json") for name, config in sources.items()}
    names: dict[str, str] = {}
    renamed: dict[str, Any] = {}
    # Pairs come last, as they name others.
    for name, config in sorted(start.sources.items(), key=lambda item: item[1].get("kind") == "pairs"):
        values = {key: names.get(value, value) if key in ("left", "right") else value for key, value in config.items()}
        new = name
        while new in renamed or not _same_data(own.get(new, values), values):
            new += "_of_start"
        names[name], renamed[new] = new, _with_task_fields(values, own.get(new, {}))
    trained = [one.model_copy(update={"source": names.get(one.source, one.source)}) for one in start.trained_tasks]
    return start.model_copy(update={"sources": renamed, "trained_tasks": trained}), names


def _same_data(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether sources differ by no more than the columns that tasks of a recipe read."""
    return {**one, "task_fields": None} == {**other, "task_fields": None}


def _with_task_fields(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The values of a source with the columns that tasks read in either."""
    first, second = values.get("task_fields") or {}, own.get("task_fields") or {}
    if not first or not second:
        return {**values, "task_fields": first or second} if first or second else values
    joined: dict[str, Any] = {}
    for key in {**first, **second}:
        mine, other = first.get(key), second.get(key)
        joined[key] = other if mine is None else mine
        if isinstance(mine, list) and isinstance(other, list):
            joined[key] = list(dict.fromkeys([*mine, *other]))
    return {**values, "task_fields": joined}


def _with_replay(recipe: MultimodalRecipe, values: dict[str, Any], start: Start) -> dict[str, Any]:
    """The values of a recipe with the start's own mixture as a fraction `replay` of the examples."""
    found, own = start.description, {(part.source, part.task): part.weight for part in recipe.mixture}
    trained = [one for one in found.trained_tasks
               if not one.of_start and one.source in found.sources and (one.source, one.task) not in own]  # fmt: skip
    if start.checkpoint is None or not trained:
        raise ConfigError(
            f"replay={recipe.replay} finds nothing else that {recipe.model.start} was trained on: drop it"
        )
    needed = [one.source for one in trained]
    for source in needed:  # it grows, as pairs may be of pairs
        needed += [found.sources[source][side] for side in ("left", "right") if side in found.sources[source]]
    fraction = recipe.replay / (1 - recipe.replay) * sum(own.values()) / sum(one.weight for one in trained)
    replayed = [{"source": one.source, "task": one.task, "weight": fraction * one.weight} for one in trained]
    tasks = {one.task: found.tasks[one.task] for one in trained if one.task in found.tasks}
    return {
        **{key: value for key, value in values.items() if key != "replay"},
        "tasks": tasks | (values.get("tasks") or {}),
        "sources": {source: found.sources[source] for source in needed} | values["sources"],
        "mixture": [*values["mixture"], *replayed],
    }


def _untrained(start: CheckpointConfig) -> tuple[str, ...]:
    """The modalities of an imported decoder whose settings a run may choose."""
    return () if start.trained_tasks else ("image", "audio")


def _modalities(own: ModalitiesConfig, start: CheckpointConfig, name: str) -> ModalitiesConfig:
    """The start's modalities with the run's settings that no weight depends on; ConfigError for one that differs."""
    chosen, free = start.modalities.model_dump(), _untrained(start)
    for section, given in own.model_dump(exclude_unset=True).items():
        kept, settings = (chosen[section], given) if isinstance(given, dict) else (chosen, {section: given})
        fixed = [] if section in free else [key for key in settings if key not in OWN_SETTINGS]
        if other := [key for key in fixed if settings[key] != kept[key]]:
            setting = f"{section}.{other[0]}" if kept is not chosen else section
            raise ConfigError(f"modalities.{setting} differs from that of {name}, on which its weights depend: drop it")
        kept |= settings
    return build(ModalitiesConfig, chosen, "modalities")
