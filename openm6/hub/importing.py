"""`openm6 import`: a published decoder as a run of ours, one layer in memory at a time, with a receipt."""

# Dimensions: D hidden size, V rows of the embedding, S tokens

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor, nn

from openm6.checkpoint.folder import latest
from openm6.checkpoint.load import open_reader
from openm6.checkpoint.save import Shard, Snapshot, named_tensors, save
from openm6.core.config import Config, build
from openm6.core.errors import ConfigError, first_line
from openm6.core.files import new_folder, replace_text
from openm6.core.run_folder import RunFolder
from openm6.hub.addition import Addition, base_tensors, check_weights, copy_beside, read_addition, unused_names
from openm6.hub.architectures import (
    EMBEDDING,
    HEAD,
    NORM,
    THEIR_EMBEDDING,
    THEIR_HEAD,
    THEIR_NORM,
    Weights,
    backbone_config,
    check_tensors,
    settings_of,
)
from openm6.hub.gguf_file import GgufFile
from openm6.hub.peft import read_adapter
from openm6.hub.pretrained import ADDITION_FILE, Pretrained, open_pretrained
from openm6.modalities.registry import Modalities, ModalitiesConfig, TextConfig, build_modalities
from openm6.modalities.text import read_tokenizer
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE, CheckpointConfig, check_external
from openm6.models.omni import Omni
from openm6.nn.attention import Attention
from openm6.nn.block import ModalityExperts
from openm6.nn.config import ModalityExpertsConfig
from openm6.nn.layers import LowRank
from openm6.nn.moe import Experts, MoE, Router
from openm6.ops.sequence import causal_meta

# What the receipt is measured on.
RECEIPT_TEXT = (
    "The capital of France is Paris. Water boils at 100 degrees Celsius, or 212 degrees Fahrenheit.\n"
    "A mixture of experts sends each token through a few of many small networks.\n"
    "def area(width, height):\n    return width * height\n"
    "床前明月光，疑是地上霜。"
)
MODALITY_EXPERTS = 4  # of each layer, each of so small a part of the size of its own network
# Routers to prototypes choose as at random and give equal gates but for rounding: they begin so much smaller.
UNDECIDED = 1e-6
HEAD_ROWS = 8192  # of the embedding or the output layer that are widened at a time


class Additions(Config):
    """What an import adds to a decoder.

    adapter: a folder of PEFT, or an addition of ours, which has all that is added. experts, top_k: copies of each dense
    network, of which a token goes through `top_k` (2), or in place of that through one in each of `prototypes` groups.
    noise: on the copies, in standard deviations of their matrices. reinit: fraction of the units of each copy that is
    drawn again (2502.19261). modalities: those whose tokens get experts of their own and, with
    `lora_rank`, low-rank updates of the attention.
    """

    adapter: Path | None = None
    experts: int | None = Field(default=None, gt=1)
    top_k: int | None = Field(default=None, gt=0)
    prototypes: int | None = Field(default=None, gt=0)
    noise: float = Field(default=0.0, ge=0)
    reinit: float = Field(default=0.0, ge=0, le=1)
    modalities: tuple[Literal["image", "audio", "numbers"], ...] = ()
    lora_rank: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_what_it_changes(self) -> Self:
        if self.top_k and self.prototypes:
            raise ValueError("a token goes through one expert of each of the prototypes: leave out top_k")
        for option, needed in (("top_k", "experts"), ("prototypes", "experts"), ("noise", "experts"),
                               ("reinit", "experts"), ("lora_rank", "modalities")):  # fmt: skip
            if getattr(self, option) and not getattr(self, needed):
                raise ValueError(f"{option} is for {needed}, and there are none: add them, or leave it out")
        return self


PLAIN = Additions()


def import_model(
    source: str, out: Path, receipt: bool = True, additions: Additions = PLAIN, sha256: str | None = None
) -> str:
    """Write a published decoder as a run at `out`; return what was imported, and how exactly.

    sha256: of a source that is one file. Everything is checked before anything is written (CheckpointError,
    ConfigError); if writing fails, nothing is left.
    """
    pretrained = open_pretrained(source, sha256)
    base = backbone_config(pretrained.settings)
    outer, *layers = base_tensors(pretrained)
    stored = [*outer, *(one for layer in layers for one in layer)]
    check_tensors(pretrained.weights, stored, str(pretrained.path))
    description, added, files = _described(source, pretrained, base, additions)
    config = description.backbone
    tokenizer = read_tokenizer(pretrained.tokenizer, str(pretrained.path))
    modalities = build_modalities(description.modalities, tokenizer, {})
    check_external(description, modalities)
    with torch.device("meta"):
        omni = Omni(config, modalities, description.embedding)
    fresh = _fresh_adapters(modalities, config)
    addition = additions.adapter
    if addition is not None and not (addition / ADDITION_FILE).is_file():
        addition = None  # but an adapter of PEFT
    if addition is not None:
        fresh = {name: tensor for name, tensor in fresh.items() if name.startswith(unused_names(description))}
        check_weights(fresh | added, stored, omni, str(addition))
    with new_folder(out) as run:
        weights = {one.ours: one.read(pretrained.weights) for one in outer}
        for name in {EMBEDDING, HEAD} & weights.keys():
            # More rows, each the mean of all, change the sum of a softmax by at most their fraction.
            if missing := len(omni.text.embedding.weight) - len(weights[name]):
                sums = [rows.float().sum(0) for rows in weights[name].split(HEAD_ROWS)]
                mean = (torch.stack(sums).sum(0, keepdim=True) / len(weights[name])).to(weights[name].dtype)
                weights[name] = torch.cat([weights[name], mean.expand(missing, -1)])
        weights |= fresh | added
        shards = (
            Shard(_layer(config, index, {one.ours: one.read(pretrained.weights) for one in layer}, additions, added))
            for index, layer in enumerate(layers)
        )
        checkpoint = _write_run(run, description, pretrained, weights, shards, files)
        if addition is not None:
            # The state does not list these files, so that they may be edited.
            copy_beside(addition, checkpoint)
        del weights
        exactness = _receipt(pretrained, tokenizer, run, config) if receipt else "no receipt asked for"
    total = sum(parameter.numel() for parameter in omni.backbone.parameters()) / 1e6
    return (
        f"{out}: {pretrained.settings['model_type']}, {config.num_layers} layers, {total:,.1f} million parameters "
        f"besides embeddings; {exactness}\n"
        f'try openm6 generate {out} --output text --text "The capital of France is"'
    )


def _described(source: str, pretrained: Pretrained, config: BackboneConfig, additions: Additions) -> Addition:
    """The description of the run, and the weights and files that are added to those of the decoder."""
    weights: dict[str, Tensor] = {}
    base_model = str(Path(source).resolve()) if Path(source).exists() else source
    if (adapter := additions.adapter) is not None:
        if (adapter / ADDITION_FILE).is_file():
            if additions != Additions(adapter=adapter):
                raise ConfigError(f"{adapter} has all that is added: leave the other options out")
            found = read_addition(adapter, pretrained)
            return found._replace(description=found.description.model_copy(update={"base_model": base_model}))
        lora, weights = read_adapter(adapter, pretrained.settings["model_type"], config, base_model)
        config = config.model_copy(update={"lora": lora})
    text = TextConfig(max_tokens=pretrained.settings.get("max_position_embeddings", 2048), imported=pretrained.text)
    description = CheckpointConfig(
        backbone=_with_experts(config, additions),
        modalities=ModalitiesConfig(text=text, prompt_attention="causal"),
        scales={},
        trained_tasks=[],
        base_model=base_model,
    )
    return Addition(description, weights, {})


def _with_experts(config: BackboneConfig, additions: Additions) -> BackboneConfig:
    """The config with the experts that are added; raise ConfigError if it has some, or an adapter of dense networks."""
    found = config.model_dump()
    if additions.experts is not None:
        if config.dense is None or config.experts is not None or config.lora is not None:
            raise ConfigError("--experts is for a dense decoder without an adapter: leave it out")
        balance = {"norm_topk_prob": True, "balance": "aux"}
        groups = additions.prototypes
        choice = {"top_k": additions.top_k or 2} if groups is None else {"num_prototypes": groups}
        found["experts"] = {**found["dense"], "num_experts": additions.experts, **choice, **balance}
        found["dense"] = None
    if additions.modalities:
        hidden = max(8, config.feed_forward(0).intermediate_size // MODALITY_EXPERTS // 8 * 8)
        found["modality_experts"] = {
            "intermediate_size": hidden, "num_experts": MODALITY_EXPERTS, "top_k": 2, "balance": "aux",
            "modalities": additions.modalities, "lora": additions.lora_rank and {"r": additions.lora_rank},
        }  # fmt: skip
    return build(BackboneConfig, found, "the imported model")


@torch.no_grad()
def _layer(
    config: BackboneConfig, layer: int, tensors: dict[str, Tensor], additions: Additions, added: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one layer: those imported, copies of a dense network as experts, first values of new ones."""
    prefix, new = f"backbone.layers.{layer}.", dict[str, MoE]()
    copied = config.experts if additions.experts is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layer)
        beside = [(f"modality_experts.{number}", one) for number, one in enumerate(config.modality_experts)]
        for name, experts in (("mlp", copied), *beside):
            if experts is not None and f"{prefix}{name}.router.weight" not in added:
                if isinstance(experts, ModalityExpertsConfig):
                    with torch.device("meta"):
                        attention = Attention(config.attention)
                    moe: MoE = ModalityExperts(experts, attention)
                else:
                    moe = MoE(Router(config.hidden_size, experts), Experts(config.hidden_size, experts), None)
                undecided = UNDECIDED if experts.num_prototypes is not None else 1
                moe.router.reset_parameters(config.deviation * undecided)
                moe.experts.reset_parameters(config.deviation, config.output_deviation)
                if name == "mlp":
                    up, down = (tensors.pop(f"{prefix}mlp.{matrix}") for matrix in ("up", "down"))
                    _fill_copies(moe.experts, up, down, additions)
                for module in moe.modules():
                    if isinstance(module, LowRank):
                        module.reset_parameters()
                new[name] = moe.to(tensors[f"{prefix}attention.qkv"].dtype)
    found = (
        (f"{prefix}{name}.{key}", tensor) for name, moe in new.items() for key, tensor in named_tensors(moe).items()
    )
    return tensors | dict(found)


def _fill_copies(experts: Experts, up: Tensor, down: Tensor, additions: Additions) -> None:
    """Fill experts with copies of a dense network, each with noise and new units of its own.  # 2F D, D F

    With Z prototypes of E experts each gate is Z / E, so the sum of Z copies needs the factor E / Z².
    """
    units, groups = down.shape[1], experts.config.num_prototypes
    factor = 1.0 if groups is None else experts.config.num_experts / groups**2
    for to_up, to_down in zip(experts.up, experts.down, strict=True):  # D 2F, F D
        drawn = torch.randperm(units)[: round(additions.reinit * units)]
        pairs = (to_up.t(), up, torch.cat([drawn, drawn + units]), 1.0), (to_down, down.t(), drawn, factor)
        for copy, matrix, rows, scale in pairs:
            values = matrix.to(torch.float32, copy=True)
            mean, deviation = values.mean(), values.std()
            if additions.noise:
                values += additions.noise * deviation * torch.randn(values.shape)
            values[rows] = mean + deviation * torch.randn(len(rows), values.shape[1])
            copy.copy_(scale * values)


def _fresh_adapters(modalities: Modalities, config: BackboneConfig) -> dict[str, Tensor]:
    """The first weights of the other modalities, which are not trained yet."""
    found: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for modality in modalities.values():
            if modality.name != "text":
                module = nn.ModuleDict(dict(modality.adapters(config.hidden_size)))
                found |= {f"adapters.{name}": tensor for name, tensor in named_tensors(module).items()}
    return found


def _write_run(
    out: Path, description: CheckpointConfig, pretrained: Pretrained, weights: dict[str, Tensor],
    shards: Iterator[Shard], files: dict[str, str | bytes],
) -> Path:  # fmt: skip
    """Write the checkpoint of a new run; return its folder."""
    run = RunFolder.open(out)
    replace_text(run.path / TOKENIZER_FILE, pretrained.tokenizer)
    snapshot = Snapshot(
        step=0,
        model=nn.Module(),
        weights=weights,
        optimizer={},
        state={"stage": "real", "precision": "fp32", "optimizer": "adamw", "base_model": description.base_model},
        files={MODEL_FILE: description.to_json(), TOKENIZER_FILE: pretrained.tokenizer, **files},
        shards=shards,
        num_shards=description.backbone.num_layers,
    )
    return save(snapshot, run.checkpoints, keep=1)


def _receipt(pretrained: Pretrained, tokenizer: Tokenizer, out: Path, config: BackboneConfig) -> str:
    """The largest difference of logits to those of `transformers` on RECEIPT_TEXT, without a low-rank adapter."""
    if importlib.util.find_spec("transformers") is None:
        return "no receipt: pip install '.[hub]' to compare logits with transformers"
    if isinstance(pretrained.weights, GgufFile) and backbone_config(pretrained.settings).experts is not None:
        return "no receipt: transformers reads no experts from GGUF files"
    tokens = torch.tensor([tokenizer.encode(RECEIPT_TEXT).ids])
    plain = config.model_copy(update={"lora": None})
    ours = imported_logits(out, plain, tokens, pretrained.text.vocab_size)
    try:
        theirs = reference_logits(pretrained, tokens)
    # Whatever another library raises: the run is whole without it.
    except Exception as error:
        return f"no receipt: transformers does not compute this model ({first_line(error)})"
    difference, deviation = compare_logits(ours, theirs)
    return (
        f"receipt: logits of {tokens.numel()} tokens differ from transformers by at most {difference:.1e} in fp32 "
        f"(their standard deviation is {deviation:.2f})"
    )


def compare_logits(ours: Iterator[Tensor], theirs: Iterator[Tensor]) -> tuple[float, float]:
    """The largest difference of logits, and the standard deviation of theirs; one block is in memory at a time."""
    differences, moments, count = [], [], 0
    for block, reference in zip(ours, theirs, strict=True):
        differences.append((block - reference).abs().max())
        exact = reference.double()
        moments.append(torch.stack([exact.sum(), exact.square().sum()]))
        count += exact.numel()
    total, squares = torch.stack(moments).sum(0)
    deviation = ((squares - total**2 / count) / (count - 1)).clamp(min=0).sqrt()
    # Python's maximum would leave out a NaN.
    return torch.stack(differences).max().item(), deviation.item()


@torch.inference_mode()
def imported_logits(run: Path, config: BackboneConfig, tokens: Tensor, rows: int) -> Iterator[Tensor]:
    """Logits of a run's text path for `rows` tokens in fp32, in blocks of HEAD_ROWS tokens.  # 1 S -> S V"""
    reader = open_reader(latest(run))
    with torch.device("meta"):
        backbone = Backbone(config)
    backbone.final_norm.load_state_dict({"weight": reader.read(NORM)}, assign=True)
    _stream_layers(backbone.layers, lambda layer, name: reader.read(f"backbone.layers.{layer}.{name}"))
    hidden, _ = backbone(_embed(reader, EMBEDDING, tokens), causal_meta(*tokens.shape))
    return _logits(hidden[0], reader, HEAD if HEAD in reader else EMBEDDING, rows)


@torch.inference_mode()
def reference_logits(pretrained: Pretrained, tokens: Tensor) -> Iterator[Tensor]:
    """The same by `transformers`, from the published files.  # 1 S -> S V"""
    # An optional dependency, which takes seconds to import.
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = pretrained.text.vocab_size
    if isinstance(pretrained.weights, GgufFile):
        # It would need accelerate to read the file itself.
        config = backbone_config(pretrained.settings)
        settings = settings_of(config, rows, pretrained.text.tie_word_embeddings, tokens.shape[1])
        model = _dense_reference(transformers, transformers.AutoConfig.for_model(**settings), pretrained)
    elif "num_experts_per_tok" in pretrained.settings:
        # It holds experts in another form than the files.
        model = transformers.AutoModelForCausalLM.from_pretrained(pretrained.path, dtype="auto")
        held = [dict(layer.named_parameters()) for layer in model.model.layers]
        _stream_layers(model.model.layers, lambda layer, name: held[layer][name])
    else:
        model = _dense_reference(transformers, transformers.AutoConfig.from_pretrained(pretrained.path), pretrained)
    embedded = _embed(pretrained.weights, THEIR_EMBEDDING, tokens)
    hidden = model.eval().model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    head = THEIR_EMBEDDING if pretrained.text.tie_word_embeddings else THEIR_HEAD
    return _logits(hidden[0], pretrained.weights, head, rows)


def _dense_reference(library: Any, config: Any, pretrained: Pretrained) -> Any:
    """A dense model of `transformers` that reads its layers while it computes."""
    with torch.device("meta"):
        model = library.AutoModelForCausalLM.from_config(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.model.norm.load_state_dict({"weight": pretrained.weights.read(THEIR_NORM)}, assign=True)
    _stream_layers(model.model.layers, lambda layer, name: pretrained.weights.read(f"model.layers.{layer}.{name}"))
    return model


def _stream_layers(layers: nn.ModuleList, read: Callable[[int, str], Tensor]) -> None:
    """Let each layer have its weights, of its index and their name in it, in fp32 and only while it computes."""

    def fill(layer: nn.Module, index: int) -> None:
        state = {name: read(index, name).float() for name, _ in layer.named_parameters()}
        layer.load_state_dict(state, assign=True, strict=False)

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, _, index=index: fill(module, index))
        layer.register_forward_hook(lambda module, *_: module.to("meta") and None)


def _embed(weights: Weights, name: str, tokens: Tensor) -> Tensor:
    """The rows of these tokens in fp32, of an embedding that is not in memory.  # 1 S -> 1 S D"""
    return torch.cat([weights.read(name, slice(token, token + 1)) for token in tokens[0].tolist()])[None].float()


@torch.inference_mode()
def _logits(hidden: Tensor, weights: Weights, name: str, rows: int) -> Iterator[Tensor]:
    """The output layer in fp32, of which HEAD_ROWS rows are in memory.  # S D -> S V"""
    for first in range(0, rows, HEAD_ROWS):
        yield F.linear(hidden.float(), weights.read(name, slice(first, min(first + HEAD_ROWS, rows))).float())
