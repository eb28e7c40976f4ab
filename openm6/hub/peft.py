"""Low-rank adapters in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors."""

# Dimensions: I inputs, O outputs, r rank, E experts, 1 of a dense network

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from openm6.checkpoint.reader import CheckpointReader
from openm6.checkpoint.save import write_tensors
from openm6.core.config import build
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.log import get_log
from openm6.hub.architectures import Settings, layer_tensors
from openm6.hub.pretrained import read_json, split_revision
from openm6.models.config import BackboneConfig
from openm6.nn.config import LoraConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# From which on fused experts have the layout that is written.
PEFT_VERSION = (0, 19, 0)
# Matrices of a layer, and what each holds.
PROJECTIONS = {
    "qkv": ("q_proj", "k_proj", "v_proj"), "output": ("o_proj",), "up": ("gate_proj", "up_proj"), "down": ("down_proj",)
}  # fmt: skip
# What would change the update in a way that is not ours.
UNLIKE = ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "layer_replication",
          "alora_invocation_tokens")  # fmt: skip
# First values of the update that PEFT takes out of the base, whose weights then differ from the published ones.
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PREFIX = "base_model.model."
Factors = tuple[Tensor, Tensor]  # A and B: E r I, E O r


class Projection(NamedTuple):
    """One projection of a layer, or of all its experts: its update here, and its name in PEFT, with {e} of experts.

    fused: the module of `transformers` that holds all experts.
    """

    name: str
    update: str
    theirs: str
    fused: str
    inputs: int
    outputs: int
    experts: int


def projections(kind: str, config: BackboneConfig) -> Iterator[Projection]:
    """All projections that may have an adapter."""
    for layer in range(config.num_layers):
        fused = f"{PREFIX}model.layers.{layer}.mlp.experts"
        for stored in layer_tensors(kind, config, layer):
            module, _, matrix = stored.ours.rpartition(".")
            if stored.columns is not None and matrix in PROJECTIONS:
                parts = zip(PROJECTIONS[matrix], stored.theirs, stored.rows, strict=True)
                for name, theirs, rows in parts:
                    path = PREFIX + theirs.removesuffix(".weight")
                    yield Projection(name, f"{module}.lora.{matrix}", path, fused, stored.columns, rows, stored.experts)


def write_adapter(
    out: Path, reader: CheckpointReader, kind: str, config: BackboneConfig, base_model: str, fused: bool
) -> None:
    """Write the adapters of a checkpoint; experts one by one, as engines read them, or `fused` as PEFT trains them."""
    lora = config.lora
    if lora is None:
        raise ConfigError("this run has no low-rank adapters: train it with model.lora, or export it as hf")
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    stacks: dict[str, dict[str, Factors]] = {}
    for one in projections(kind, config):
        if f"{one.update}.a.{one.name}" in reader:
            a, b = (reader.read(f"{one.update}.{factor}.{one.name}") for factor in "ab")
            a, b = (a.mT, b.mT) if one.experts else (a[None], b[None])
            if one.experts and fused:
                stacks.setdefault(one.fused, {})[one.name] = a, b
            else:
                modules.add(one.theirs.rpartition(".")[2])
                for expert, pair in enumerate(zip(a, b, strict=True)):
                    tensors |= _named(one.theirs.format(e=expert), pair)
    for module, stack in stacks.items():
        # The wrapper of down_proj is around that of gate_up_proj.
        inner = module + ".base_layer" * ("down_proj" in stack)
        if len(stack.keys() & {"gate_proj", "up_proj"}) == 1:
            raise ConfigError("fused experts have gate_proj and up_proj in one: export this adapter without --fused")
        if "gate_proj" in stack:
            (gate_a, gate_b), (up_a, up_b) = stack["gate_proj"], stack["up_proj"]
            blocks = torch.stack([torch.block_diag(*pair) for pair in zip(gate_b, up_b, strict=True)])
            tensors |= _named(inner, _flat(torch.cat([gate_a, up_a], 1), blocks))
        if "down_proj" in stack:
            tensors |= _named(module, _flat(*stack["down_proj"]))
    whole = {name.replace("gate_", "gate_up_") for stack in stacks.values() for name in stack} - {"up_proj"}
    base_model, revision = split_revision(base_model)
    alpha, double = lora.scale * lora.r, [r".*\.gate_up_proj"] if "gate_up_proj" in whole else []
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "revision": revision,
        "r": lora.r, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(modules),
        "target_parameters": [f"mlp.experts.{name}" for name in sorted(whole)] or None, "modules_to_save": None,
        "rank_pattern": dict.fromkeys(double, 2 * lora.r), "alpha_pattern": dict.fromkeys(double, 2 * alpha),
        "use_rslora": False, "inference_mode": True, "peft_version": ".".join(map(str, PEFT_VERSION)),
    }  # fmt: skip
    write_tensors(out / WEIGHTS_FILE, tensors)
    about = json.dumps({"base_model": base_model, "library_name": "peft", "tags": ["lora", "openm6"]})
    card = f"---\n{about}\n---\n\nA low-rank adapter, trained with OpenM6.\n"
    for name, text in ((CONFIG_FILE, json.dumps(settings, indent=2)), ("README.md", card)):
        (out / name).write_text(text, encoding="utf-8", newline="\n")


def _named(module: str, factors: Factors) -> dict[str, Tensor]:
    return {f"{module}.lora_{name}.weight": one.contiguous() for name, one in zip("AB", factors, strict=True)}


def _flat(a: Tensor, b: Tensor) -> Factors:
    """E r I, E O r -> E·r I, and O r·E, whose columns are in the order of ranks."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def read_adapter(folder: Path, kind: str, config: BackboneConfig, source: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter in a folder of PEFT for a decoder, as config and tensors of ours, which have one rank and scale.

    A warning if its base has another name than `source`, whose sizes it may have nevertheless. CheckpointError if it
    is not whole, for another base or of an unknown layout; ConfigError if it is more than LoRA.
    """
    settings = read_json(folder / CONFIG_FILE, needed=True)
    unlike = [key for key in UNLIKE if settings.get(key)] + ["bias"] * (settings.get("bias", "none") != "none")
    begun = str(settings.get("init_lora_weights"))
    unlike += [f"init_lora_weights {begun}"] * begun.startswith(CHANGE_BASE)
    if settings.get("peft_type") != "LORA" or unlike:
        what = ", ".join(unlike) or f"peft_type {settings.get('peft_type')}"
        raise ConfigError(f"{folder} is an adapter with {what}, which is not supported: use plain LoRA")
    base = str(settings.get("base_model_name_or_path") or "")
    if (named := _bare_name(base)) and (ours := _bare_name(source)) and named != ours:
        get_log().warning(f"{folder} was trained for {base}: its answers are wrong if {source} has other weights")
    reader, every = CheckpointReader(folder, WEIGHTS_FILE.partition(".")[0]), list(projections(kind, config))
    left, found = set(reader.names), dict[Projection, Factors]()
    for one in every:
        names = [one.theirs.format(e=expert) for expert in range(max(1, one.experts))]
        module, *pair = names[0], *([f"{name}.lora_{factor}.weight" for name in names] for factor in "AB")
        if all(key in reader for keys in pair for key in keys):
            a, b = (torch.stack([reader.read(key) for key in keys]) for keys in pair)
        elif one.experts and (fused := _fused(reader, settings, one)) is not None:
            module, pair, (a, b) = fused
        else:
            continue
        left.difference_update(*pair)
        if (a.shape[2], b.shape[1]) != (one.inputs, one.outputs):
            raise CheckpointError(f"{folder}: {module} has other sizes than in this model: it is for another base")
        patterns = (settings.get("alpha_pattern") or {}).items()
        try:
            alphas = [alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", module.removeprefix(PREFIX))]
        except re.error as error:
            raise ConfigError(f"{folder}: a key of alpha_pattern is no pattern ({error})") from None
        rank = a.shape[1] ** (0.5 if settings.get("use_rslora") else 1)
        # In bf16, a factor that is no power of two would be rounded.
        found[one] = a, b.float() * (float((alphas or [settings.get("lora_alpha", 8)])[0]) / rank)
    if left or not found:
        missing = f"has {min(left)}, which this model lacks" if left else "adapts nothing of this model"
        raise CheckpointError(f"{folder} {missing}: it is for another base")
    size = max(a.shape[1] for a, _ in found.values())
    size = -(-size // 8) * 8 if config.experts is not None else size
    targets = list(dict.fromkeys(one.name for one in found))
    tensors: dict[str, Tensor] = {}
    for one in (one for one in every if one.name in targets):
        # Zeros fill up a smaller rank, and all of a layer without an adapter.
        count = max(1, one.experts)
        whole_a, whole_b = torch.zeros(count, size, one.inputs), torch.zeros(count, one.outputs, size)
        if one in found:
            a, b = found[one]
            whole_a[:, : a.shape[1]], whole_b[..., : b.shape[2]] = a, b
        for factor, whole in (("a", whole_a), ("b", whole_b)):
            tensors[f"{one.update}.{factor}.{one.name}"] = whole.mT.contiguous() if one.experts else whole[0]
    return build(LoraConfig, {"r": size, "alpha": size, "targets": targets}, "adapter"), tensors


def _bare_name(model: str) -> str:
    """What a folder, a GGUF file and a repository of one model have in common; empty if the name says nothing."""
    if re.fullmatch(r"model\.gguf|[0-9a-f]{40}", Path(model).name):
        return ""
    return re.sub(r"([.-](i?q\d\w*|b?f16|f32))?\.gguf$", "", Path(split_revision(model)[0]).name.lower())


def _fused(
    reader: CheckpointReader, settings: Settings, one: Projection
) -> tuple[str, list[list[str]], Factors] | None:
    """Module, keys and factors of experts that are stored in one tensor, gate and up together; None if they are not.

    Before 0.19 PEFT gave A and B each other's sizes. Any pair whose sizes differ shows it, or else the version does;
    CheckpointError without.
    """
    part = "down_proj" if one.name == "down_proj" else "gate_up_proj"
    width, hidden = (one.outputs, one.inputs) if part == "down_proj" else (one.inputs, one.outputs)
    sizes = {"gate_up_proj": (width, 2 * hidden), "down_proj": (hidden, width)}
    targets = [name for name in sizes if any(x.endswith(name) for x in settings.get("target_parameters") or [])]
    # The wrapper of down_proj is around that of gate_up_proj.
    modules = {name: one.fused + ".base_layer" * (name != targets[-1]) for name in targets}
    keys = {name: [f"{module}.lora_{x}.weight" for x in "AB"] for name, module in modules.items()}
    if part not in targets or not all(key in reader for pair in keys.values() for key in pair):
        return None
    found = {name: (reader.shape(a)[1], reader.shape(b)[0]) for name, (a, b) in keys.items()}
    swapped = [found[name] == sizes[name][::-1] for name in targets if len(set(sizes[name])) > 1]
    version = re.match(r"(\d+)\.(\d+)", str(settings.get("peft_version")))
    if not swapped and version is None:
        raise CheckpointError(
            f"{reader.folder} has experts in the layout of PEFT before or since 0.19, and their sizes fit both: "
            f"add the peft_version that wrote it to {CONFIG_FILE}"
        )
    old = swapped[0] if swapped else version is not None and (int(version[1]), int(version[2])) < PEFT_VERSION[:2]
    flat_a, flat_b = map(reader.read, keys[part])
    if len(flat_a) % one.experts or flat_b.shape[1] != len(flat_a):
        raise CheckpointError(f"{reader.folder} is not an adapter for {one.experts} experts: it is for another base")
    a = flat_a.view(one.experts, -1, flat_a.shape[1])
    b = flat_b.view(len(flat_b), -1, one.experts).permute(2, 0, 1)
    a, b = (b.mT, a.mT) if old else (a, b)
    b = b if part == "down_proj" else b.chunk(2, 1)[one.name == "up_proj"]
    return f"{one.fused}.{part}", [keys[part]], (a, b)
