"""Shards written straight from memory: readable by others, read into place, refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openm6.checkpoint.folder import INDEX_FILE
from openm6.checkpoint.reader import OFFSETS, SHARDING, CheckpointReader
from openm6.checkpoint.save import Shard, write_shards, write_tensors
from openm6.core.errors import CheckpointError

TENSORS = {
    "b": torch.randn(3, 5).to(torch.bfloat16),
    "a": torch.arange(7, dtype=torch.int8),
    "scalar": torch.tensor(2.5),
    "turned": torch.randn(4, 6).T,
}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    read = load_file(str(tmp_path / "x.safetensors"))
    assert sorted(read) == sorted(TENSORS)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_the_order_of_tensors_does_not_change_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", TENSORS)
    write_tensors(tmp_path / "y", dict(reversed(TENSORS.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_shards_are_made_one_at_a_time_and_listed(tmp_path: Path) -> None:
    def others():
        for number in (1, 2):
            assert (tmp_path / f"model-0000{number}-of-00003.safetensors").exists()  # the one before is written
            yield Shard({f"w{number}": torch.full((2,), float(number))}, {f"w{number}::row": torch.ones(1)})

    write_shards(tmp_path, Shard({"edge": torch.zeros(1)}), others(), 2)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["weight_map"]["w2"] == "model-00003-of-00003.safetensors" and index["metadata"]["total_size"] == 20
    weights, kept = CheckpointReader(tmp_path, "model"), CheckpointReader(tmp_path, "optimizer")
    assert sorted(weights.names) == ["edge", "w1", "w2"] and sorted(kept.names) == ["w1::row", "w2::row"]


def test_a_tensor_is_read_into_the_memory_that_waits_for_it(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model-1.safetensors", TENSORS)
    reader = CheckpointReader(tmp_path, "model")
    record = torch.zeros(64, dtype=torch.uint8)
    target = record[16:46].view(torch.bfloat16).view(3, 5)
    reader.read_into("b", target)
    assert torch.equal(target, TENSORS["b"]) and record[:16].sum() == 0 and record[46:].sum() == 0
    wide = torch.zeros(3, 5)
    reader.read_into("b", wide)  # another type is converted
    assert torch.equal(wide, TENSORS["b"].float())


def test_a_file_is_opened_for_its_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of thousands of tensors takes longer to parse than a tensor takes to read."""
    write_tensors(tmp_path / "model-1.safetensors", TENSORS)
    reader = CheckpointReader(tmp_path, "model")
    for name in ("json.loads", "safe_open"):
        monkeypatch.setattr(f"openm6.checkpoint.reader.{name}", lambda *_, **__: pytest.fail("parsed again"))
    for name, tensor in TENSORS.items():
        target = torch.zeros_like(tensor)
        reader.read_into(name, target)
        assert torch.equal(target, tensor) and torch.equal(reader.read(name), tensor)


@pytest.mark.parametrize("tensor", [torch.tensor(2.5), torch.zeros(0, 3), torch.tensor([True, False])])
def test_odd_tensors_are_read_as_they_were(tmp_path: Path, tensor: torch.Tensor) -> None:
    write_tensors(tmp_path / "model-1.safetensors", {"odd": tensor})
    read = CheckpointReader(tmp_path, "model").read("odd")
    assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_any_region_is_read_from_any_shards(tmp_path: Path) -> None:
    """Shards of 2 and 3 rows, regions that lie in one, in both, or in none of one."""
    whole = torch.arange(20.0).view(5, 4)
    for rank, (first, last) in enumerate(((0, 2), (2, 5))):
        place = {SHARDING: json.dumps({"w": {OFFSETS: [first, 0]}})}
        save_file({"w": whole[first:last].contiguous()}, tmp_path / f"shard-{rank}.safetensors", place)
    reader = CheckpointReader(tmp_path, "all")
    assert torch.equal(reader.read("w"), whole) and torch.equal(reader.read("w", slice(1, 4)), whole[1:4])
    for top, down, left, across in ((0, 5, 0, 4), (1, 3, 0, 4), (0, 2, 1, 2), (3, 1, 2, 2), (4, 0, 0, 4)):
        for dtype in (torch.float32, torch.float64):
            target = torch.zeros(down, across, dtype=dtype)
            reader.read_into("w", target, (top, left), whole.shape)
            assert torch.equal(target, whole[top : top + down, left : left + across].to(dtype))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        CheckpointReader(tmp_path, "model")
    write_tensors(tmp_path / "model-1.safetensors", TENSORS)
    reader = CheckpointReader(tmp_path, "model")
    with pytest.raises(CheckpointError, match="lacks 'c'.*openm6 convert"):
        reader.read_into("c", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"has shape \[3, 5\], the model expects \[5, 3\]"):
        reader.read_into("b", torch.zeros(5, 3))
    (tmp_path / "model-2.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        CheckpointReader(tmp_path, "model")
