"""Layers that come as they are used: the same answers bit for bit, few buffers, and one sentence where it cannot be."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openm6.checkpoint.folder import STATE_FILE
from openm6.checkpoint.reader import OFFSETS, SHARDING, CheckpointReader
from openm6.checkpoint.save import Snapshot, named_tensors, save
from openm6.core.errors import CheckpointError, ConfigError
from openm6.inference.decode import TextHead
from openm6.inference.decode_batch import DecodeBatch
from openm6.inference.engine import generate_texts
from openm6.inference.load import BUFFERS, LoadedModel, OffloadedInference, convert_weights, load, place_offloaded
from openm6.inference.masked import decode_masked
from openm6.inference.prefill import prefill
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments
from openm6.models.config import BackboneConfig
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE
from openm6.models.omni import Omni
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.offload.weight_store import WeightStore, open_streams
from openm6.optim.rules import WEIGHT
from tests.small_model import BACKBONE, loaded, modalities

EXPERTS = ExpertsConfig(intermediate_size=32, num_experts=4, top_k=2, num_shared=1)
SHAPES = {
    "sparse": {"num_layers": 5, "experts": EXPERTS},
    "mixed": {
        "num_layers": 5,
        "experts": EXPERTS,
        "moe_layer_freq": 2,
        "dense": DenseConfig(intermediate_size=64),
    },
    "shared": {"num_layers": 5, "experts": EXPERTS, "sharing": 2, "share_routers": True},
}


def checkpoint(folder: Path, shape: str) -> Path:
    torch.manual_seed(3)
    config = BackboneConfig.model_validate({**BACKBONE.model_dump(), **SHAPES[shape]})
    omni = Omni(config, modalities()).eval()
    with torch.no_grad():
        for parameter in omni.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    description = loaded().description.model_copy(update={"backbone": config})
    tokenizer = modalities()["text"].tokenizer.to_str()  # type: ignore[attr-defined]
    files = {MODEL_FILE: description.to_json(), TOKENIZER_FILE: tokenizer}
    return save(Snapshot(1, omni, {}, {}, files=files), folder, keep=1)


def source_of(model: LoadedModel) -> OffloadedInference:
    source = model.omni.backbone.executor
    assert isinstance(source, OffloadedInference)
    return source


def answers(model: LoadedModel) -> tuple[list[str], torch.Tensor, list[torch.Tensor]]:
    """A text, an image's codes, and the scores of texts decoded in rows."""
    prompt = source_segments([Part("text", "draw the digit seven")], model.modalities)
    texts = generate_texts(model, [prompt], Sampling(max_tokens=4))
    sampling = MaskedSampling(steps=2, seed=1)
    codes = decode_masked(model.omni, [prompt], [model.image.blank()], sampling)
    dtype = model.omni.backbone.final_norm.weight.dtype
    rows = DecodeBatch(TextHead.of(model.omni, model.text), 2, 64, batch_invariant=dtype == torch.float32)
    scores = []
    for index in range(2):
        place, _ = prefill(model.omni, prompt, rows.cache, rows.next_slot)
        rows.add(index, Sampling(max_tokens=3), place, model.text.start, top=5)
        rows.step()
        scores += [torch.tensor([score for _, score in row.scores[-1][1]]) for row in rows.rows]
    return texts, codes, scores


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_gpu_layers", [0, 2])
def test_answers_are_those_of_a_model_on_the_device(tmp_path: Path, shape: str, num_gpu_layers: int) -> None:
    folder = checkpoint(tmp_path, shape)
    model = load(folder, torch.device("cpu"), num_gpu_layers)
    texts, codes, scores = answers(model)
    expected = answers(load(folder, torch.device("cpu")))
    assert texts == expected[0] and torch.equal(codes, expected[1])
    assert all(torch.equal(found, true) for found, true in zip(scores, expected[2], strict=True))
    store = source_of(model).store
    assert store is not None and len(store._buffers) == BUFFERS and not store.storage
    assert store.moved_bytes >= BUFFERS * min(layout.read_bytes for layout in store.layouts)


def test_bfloat16_is_converted_on_the_way(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "mixed")
    offloaded, on_device = (load(folder, torch.device("cpu"), index) for index in (1, None))
    for model in (offloaded, on_device):
        model.omni.to(torch.bfloat16)
    found, expected = answers(offloaded), answers(on_device)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert offloaded.omni.backbone.block(1).attention.qkv.dtype == torch.bfloat16


def test_host_memory_gives_what_the_files_give(tmp_path: Path) -> None:
    """A GPU's store, which keeps the sets in host memory, on a CPU."""
    model = load(checkpoint(tmp_path, "mixed"), torch.device("cpu"), 1)
    expected = answers(model)
    source = source_of(model)
    from_files, cpu = source.store, torch.device("cpu")
    assert from_files is not None
    store = WeightStore(from_files.layouts, (), cpu, open_streams(cpu), BUFFERS, pin=False)
    for place in range(len(store.layouts)):
        source._read(place, store.stored(place))
    assert store.layouts[0].views(store.storage[0])["attention.qkv"][WEIGHT].any()
    source.store, source._open = store, None
    found = answers(model)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1]) and store.moved_bytes > 0


def test_as_many_layers_as_there_are_is_the_usual_way(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "sparse"), torch.device("cpu"), 5)
    assert not model.omni.backbone.executor.offloaded


def test_what_cannot_be_streamed_is_one_sentence(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "sparse")
    model = load(folder, torch.device("cpu"), 1)
    with pytest.raises(ConfigError, match="int8"):
        convert_weights(model.omni, "int8")


def cut_over_ranks(folder: Path) -> None:
    """The same weights as two and three ranks would write them: unevenly by rows, by columns too, one of them twice."""
    weights = load_file(folder / "model.safetensors")
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(5)]
    places: list[dict[str, dict[str, list[int]]]] = [{} for _ in range(5)]
    for index, (name, tensor) in enumerate(sorted(weights.items())):
        rows = [0, *sorted({len(tensor) // 3, len(tensor)} - {0})] if tensor.ndim else [0, 1]
        columns = [0, tensor.shape[1] // 2, tensor.shape[1]] if tensor.ndim > 1 and index % 2 else [0]
        grid = list(product(pairwise(rows), pairwise(columns) if len(columns) > 1 else [(0, None)]))
        for rank, ((top, bottom), (left, right)) in enumerate(grid):
            part = tensor if tensor.ndim == 0 else tensor[top:bottom]
            part = part if tensor.ndim < 2 else part[:, left:right]
            files[rank][name] = part.contiguous()
            places[rank][name] = {OFFSETS: [top, left, *[0] * tensor.ndim][: tensor.ndim]}
    alike = min(files[0], key=lambda name: files[0][name].numel())
    files[4][alike], places[4][alike] = files[0][alike], places[0][alike]
    for rank, (tensors, place) in enumerate(zip(files, places, strict=True)):
        path = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, path, {SHARDING: json.dumps(place)})
    (folder / "model.safetensors").unlink()
    state = json.loads((folder / STATE_FILE).read_text())
    state["files"] = {path.name: path.stat().st_size for path in folder.glob("shard-*")}
    (folder / STATE_FILE).write_text(json.dumps(state))


def test_the_files_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "mixed")
    expected = answers(load(folder, torch.device("cpu")))
    cut_over_ranks(folder)
    whole = load(folder, torch.device("cpu"))
    assert answers(whole)[0] == expected[0], "torch reads them, too"
    offloaded = load(folder, torch.device("cpu"), 1)
    texts, codes, scores = answers(offloaded)
    assert source_of(offloaded).store is not None and texts == expected[0] and torch.equal(codes, expected[1])
    assert all(torch.equal(found, true) for found, true in zip(scores, expected[2], strict=True))
    catalogue = CheckpointReader(folder, "all")
    for name, tensor in named_tensors(whole.omni).items():
        assert torch.equal(catalogue.read(name), tensor)
    next(folder.glob("shard-00001-*")).unlink()
    with pytest.raises(CheckpointError, match="holds only parts of|lacks"):
        place_offloaded(offloaded.omni, folder, 1, torch.device("cpu"), host_copy=True)
