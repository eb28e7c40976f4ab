"""One step: precision, what is skipped, what is summed over ranks, and how blocks run."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from openm6.core.errors import ConfigError
from openm6.distributed.process_group import ProcessGroupContext
from openm6.energy.tracker import WorkCount
from openm6.kernels.probe import Capabilities
from openm6.nn.executor import CheckpointedExecutor, CompiledExecutor, LayerExecutor
from openm6.nn.moe import RouterStats
from openm6.ops.matmul import matmul_dtype
from openm6.ops.sequence import additive_mask, visible
from openm6.optim.sharding import ShardSpec
from openm6.train.config import LoopConfig
from openm6.train.step import StepNumbers, TrainStep, resolve_precision, seed_everything, sum_over_ranks
from openm6.train.training_task import StepResult
from tests.train.toy_training import ToyTraining, toy_config
from tests.train.words_training import WordsTraining, words_backbone, words_config


def test_seeding_covers_every_generator_and_depends_on_the_purpose() -> None:
    def draws(step: int) -> tuple[float, float, float]:
        seed_everything(1, "step", step)
        return float(torch.rand(())), float(np.random.rand()), random.random()

    first, second, again = draws(1), draws(2), draws(1)
    assert first == again
    assert all(left != right for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("clip", [None, 0.01])
def test_clipping(clip: float | None) -> None:
    """The update sees the clipped gradient; the norm that is reported is the one before."""
    training = ToyTraining()
    train_step = TrainStep(training, toy_config().model_copy(update={"max_grad_norm": clip}))
    seen: list[float] = []
    train_step.optimizer.register_step_pre_hook(
        lambda *_: seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in train_step.parameters])))
    )
    report = train_step.update(next(training.batches()), 1, 10)
    assert report.grad_norm > 0.05
    assert seen[0] == pytest.approx(report.grad_norm if clip is None else clip, rel=1e-3)


class TwoRanks(ProcessGroupContext):
    """Stands in for two ranks with the same values."""

    size = 2

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)


def test_everything_of_a_step_is_summed_over_ranks() -> None:
    ones = torch.ones(())
    stats = RouterStats(0, torch.tensor([1.0, 3.0]), ones * 0.25, ones)
    work = {
        "modality": {"text": WorkCount(2**24 + 1, 0.5), "image_out": WorkCount(0, 0.0)},
        "task": {"translation": WorkCount(3, 7.0)},
    }
    result, counts = sum_over_ranks(
        StepResult(ones, {"loss/text": ones * 2, "plain": 3.0}, [stats], work), 2**24 + 1, TwoRanks()
    )
    report = StepNumbers(1, 0.1, result, counts, ones).read()
    assert report.tokens == 2 * (2**24 + 1) and report.loss == 2.0
    assert report.metrics == {"loss/text": 4.0, "plain": 6.0}
    assert result.loads[0].load.tolist() == [2.0, 6.0] and report.dropped == [0.5]
    assert report.work == {
        "modality": {"text": WorkCount(report.tokens, 1.0), "image_out": WorkCount(0, 0.0)},
        "task": {"translation": WorkCount(6, 14.0)},
    }


def test_gradients_do_not_pile_up() -> None:
    training = ToyTraining()
    train_step = TrainStep(training, toy_config())
    train_step.update(next(training.batches()), 1, 10)
    assert all(parameter.grad is None for parameter in train_step.parameters)


def test_half_precision_is_used_where_asked() -> None:
    train_step = TrainStep(ToyTraining(), toy_config().model_copy(update={"precision": "bf16"}))
    with train_step.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with TrainStep(ToyTraining(), toy_config()).autocast():  # auto, on a processor
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_auto_is_settled_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, precision in ((True, "bf16-products"), (False, "fp32")):
        monkeypatch.setattr("openm6.train.step.has_bf16", lambda fast=fast: fast)
        assert resolve_precision("auto", torch.device("cpu")) == precision
        with TrainStep(ToyTraining(), toy_config()).autocast():
            assert (matmul_dtype(torch.ones(2)) == torch.bfloat16) == fast


def test_products_alone_in_half_are_for_processors() -> None:
    with pytest.raises(ConfigError, match="is for processors: on a GPU use bf16"):
        resolve_precision("bf16-products", torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "plain"),  # on a processor, `auto` compiles nothing and keeps everything
        ({"compile": True}, "compiled"),
        ({"activation_checkpointing": 2}, "recomputed"),
        ({"compile": True, "activation_checkpointing": 3}, "recomputed, compiled"),
    ],
)
def test_blocks_run_as_the_config_says(settings, expected):
    training = WordsTraining(words_backbone())
    TrainStep(training, LoopConfig(**settings)).choose_execution(1024)
    run = training.backbone.executor
    words = []
    if isinstance(run, CheckpointedExecutor):
        assert run.num_layers == settings["activation_checkpointing"]
        words.append("recomputed")
        run = run.inner
    words += ["compiled"] if isinstance(run, CompiledExecutor) else []
    assert (", ".join(words) or "plain") == expected


def test_without_a_compiler_blocks_run_uncompiled_with_one_sentence(monkeypatch, caplog):
    monkeypatch.setattr("openm6.train.step.compile_failure", lambda device: "install a C compiler")
    training = WordsTraining(words_backbone())
    TrainStep(training, LoopConfig(compile=True, precision="fp32")).choose_execution(1024)
    assert type(training.backbone.executor) is LayerExecutor
    assert caplog.messages == ["blocks are not compiled, so slower: install a C compiler"]


def test_on_a_gpu_without_bf16_experts_train_uncompiled(monkeypatch):
    """A T4: its precision is fp32, in which the experts' product asks for counts, and all else is compiled."""
    t4 = Capabilities(torch.device("cuda", 0), "Tesla T4", (7, 5), False, None)
    monkeypatch.setattr("openm6.train.step.capabilities", lambda device: t4)
    precision = resolve_precision("auto", t4.device)
    eager = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: eager)
    monkeypatch.setattr("openm6.train.step.compile_failure", lambda device: None)
    # Masks as on a GPU.
    masks = lambda meta, dtype: additive_mask(visible(meta, meta), dtype)  # noqa: E731
    monkeypatch.setattr("openm6.models.backbone.query_blocks", masks)
    losses = []
    for compiled in (False, True):
        training = WordsTraining(words_backbone())
        step = TrainStep(training, words_config(precision=precision, compile=compiled))
        losses.append([step.update(training.batch(number), number, 10).loss for number in (1, 2, 3)])
    executor = training.backbone.executor
    assert precision == "fp32" and executor.compilations == 1 and not executor.broken
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_choice_of_others_stands():
    training = WordsTraining(words_backbone())
    own = training.backbone.executor = CheckpointedExecutor(LayerExecutor(), 1)
    TrainStep(training, LoopConfig(compile=True)).choose_execution(1024)
    assert training.backbone.executor is own


class HalfShard(ShardSpec):
    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten()[: tensor.numel() // 2]


class TwoShards(TwoRanks):
    """Stands in for two ranks with half of each parameter; the other one recomputes three layers."""

    def gather(self, value):
        return [value, 3]

    def shard_spec(self, parameter):
        return HalfShard()


def test_all_ranks_recompute_as_many_layers_and_count_their_shard_of_the_weights(monkeypatch):
    training, free = WordsTraining(words_backbone()), []
    step, backbone = TrainStep(training, LoopConfig(compile=False)), training.backbone
    training.ranks = TwoShards()
    del backbone.final_norm
    backbone.final_norm = SimpleNamespace(weight=SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.float32))
    for name, value in (("mem_get_info", (10**9, 10**9)), ("memory_reserved", 0), ("memory_allocated", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr("openm6.train.step.layers_to_recompute", lambda *args: free.append(args[3]) or 1)
    step.choose_execution(1024)
    # A gradient and two moments in fp32, of half of the weights.
    assert free == [10**9 - 3 * 4 * sum(one.numel() for one in step.parameters) // 2]
    assert backbone.executor.num_layers == 3


def test_no_layers_below_zero():
    with pytest.raises(ValidationError, match="0 or more"):
        LoopConfig(activation_checkpointing=-1)
