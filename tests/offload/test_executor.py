"""Streamed training: equal to resident training to the bit, whatever comes and goes, and exactly resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openm6.checkpoint.folder import latest, step_folder
from openm6.checkpoint.load import load_model
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.run_folder import RunFolder
from openm6.models.config import BackboneConfig
from openm6.nn import attention
from openm6.nn.config import LoraConfig
from openm6.offload.config import OffloadConfig
from openm6.offload.executor import _row_parts, run_block
from openm6.offload.weight_store import Streams, open_streams
from openm6.ops.sequence import causal_meta
from openm6.optim.config import PRECISION_OF_BYTES, OptimizerConfig
from openm6.train.config import LoopConfig, Precision, StagesConfig, SwitchConfig
from openm6.train.loop import train
from openm6.train.offloaded import OffloadedTrainStep
from openm6.train.step import TrainStep
from tests.devices import CPU, on_each_device
from tests.offload.strict_streams import WatchedStreams, late_streams
from tests.train.words_training import WordsTraining, words_backbone, words_config

PLAIN = words_backbone()
SHARED = words_backbone(sharing=(0, 1, 0, 1))


def config_of(bytes_per_parameter: int = 2, **offload: Any) -> LoopConfig:
    optimizer = OptimizerConfig(learning_rate=0.01, precision=PRECISION_OF_BYTES[bytes_per_parameter])
    return words_config(
        optimizer=optimizer, max_grad_norm=None, offload=OffloadConfig(**{"num_gpu_layers": 0, **offload})
    )


def steps_of(train_step: TrainStep, training: WordsTraining, count: int = 3) -> list[float]:
    return [train_step.update(training.batch(step), step, 10).loss for step in range(1, count + 1)]


def opened(training: WordsTraining, config: LoopConfig, streams: Streams | None) -> OffloadedTrainStep:
    """The train step on these streams, or on those of its device."""
    with patch("openm6.train.offloaded.open_streams", (lambda device: streams) if streams else open_streams):
        return OffloadedTrainStep(training, config)


def offloaded_run(
    backbone: BackboneConfig, config: LoopConfig, streams: Streams | None = None, device: torch.device = CPU
) -> tuple[list[float], list[Tensor]]:
    """Losses of three steps, and all bytes of the store and the other parameters after them."""
    training = WordsTraining(backbone, device=device)
    train_step = opened(training, config, streams)
    losses = steps_of(train_step, training)
    train_step.store.synchronize()
    pinned = [stored.is_pinned() for stored in train_step.store.storage if stored.is_cpu]
    assert all(pinned) if device != CPU else not any(pinned)
    records = [stored.cpu().clone() for stored in train_step.store.storage]
    others = [p.detach().cpu().clone() for p in training.model.parameters() if not p.is_meta]
    train_step.close()
    return losses, [*records, *others]


def assert_same(left: tuple[list[float], list[Tensor]], right: tuple[list[float], list[Tensor]]) -> None:
    assert left[0] == right[0]
    assert all(torch.equal(a, b) for a, b in zip(left[1], right[1], strict=True))


@pytest.mark.parametrize("backbone", [PLAIN, SHARED, words_backbone(sharing="all", share_routers=True)])
@pytest.mark.parametrize(
    ("activation_checkpointing_every", "precision"), [(1, "fp32"), (3, "fp32"), (3, "bf16-products")]
)
def test_with_sixteen_bytes_streaming_is_plain_training_to_the_bit(
    backbone: BackboneConfig, activation_checkpointing_every: int, precision: Precision
) -> None:
    training, other = WordsTraining(backbone), WordsTraining(backbone)
    plain = TrainStep(training, words_config(max_grad_norm=None, precision=precision))
    config = config_of(16, activation_checkpointing_every=activation_checkpointing_every).model_copy(
        update={"precision": precision}
    )
    offloaded = OffloadedTrainStep(other, config)
    assert steps_of(plain, training) == steps_of(offloaded, other)
    named = dict(training.model.named_parameters())
    for index in range(offloaded.num_shards):
        layer = backbone.group_layers[index]
        for name, stored in offloaded.store.stored(index).items():
            assert torch.equal(stored["weight"], named[f"backbone.layers.{layer}.{name}"]), name
    resting = {name: one for name, one in other.model.named_parameters() if not one.is_meta}
    assert len(resting) > 3
    for name, parameter in resting.items():
        assert torch.equal(parameter, named[name]), name


def test_gradients_of_layers_are_clipped_in_fp32() -> None:
    bound = 1e-4
    training = WordsTraining(PLAIN)
    offloaded = OffloadedTrainStep(training, config_of(16).model_copy(update={"max_grad_norm": bound}))
    seen: list[float] = []
    update = offloaded.rule.update

    def watched(stored: Any, gradient: torch.Tensor, args: Any) -> None:
        seen.append(float(gradient.square().sum()))
        update(stored, gradient, args)

    with patch.object(offloaded.rule, "update", watched):
        report = offloaded.update(training.batch(1), 1, 10)
    layers = offloaded.num_shards
    assert report.grad_norm > 100 * bound, "the norm before clipping is reported"
    assert sum(seen) == pytest.approx(layers * bound**2, rel=1e-3)


@pytest.mark.parametrize("bytes_per_parameter", [16, 4, 2, 1])
@pytest.mark.parametrize("backbone", [PLAIN, SHARED])
def test_streamed_is_resident_to_the_bit(backbone: BackboneConfig, bytes_per_parameter: int) -> None:
    on_device = offloaded_run(backbone, config_of(bytes_per_parameter, num_gpu_layers="auto"))
    for changes in (
        {},
        {"num_gpu_layers": 1},
        {"buffers": 3},
        {"num_gpu_layers": (1,), "activation_checkpointing_every": 2},
    ):
        assert_same(on_device, offloaded_run(backbone, config_of(bytes_per_parameter, **changes)))


ADAPTED = words_backbone(lora=LoraConfig(r=8))
KEPT: dict[str, tuple[BackboneConfig, Callable[[str], bool]]] = {  # what is trained
    "all": (ADAPTED, lambda name: True),
    "adapters": (ADAPTED, lambda name: ".lora." in name),
    "last layer": (PLAIN, lambda name: "layers.3" in name),
    "parts of layers": (PLAIN, lambda name: "norm" in name or ("attention" in name) == ("layers.1" in name)),
    "parts of shared layers": (SHARED, lambda name: "mlp" in name),
}


def training_of(case: str) -> WordsTraining:
    backbone, trains = KEPT[case]
    training = WordsTraining(backbone)
    for name, parameter in training.model.named_parameters():
        parameter.requires_grad_(trains(name))
    return training


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("every", [1, 3])
def test_frozen_weights_are_read_alone_and_the_rest_is_plain_training_to_the_bit(case: str, every: int) -> None:
    """No gradient, no optimizer state and no write-back of what is frozen; its bytes stay."""
    training, other = training_of(case), training_of(case)
    first = {name: one.detach().clone() for name, one in training.model.named_parameters()}
    plain = TrainStep(training, words_config(max_grad_norm=None))
    offloaded = OffloadedTrainStep(other, config_of(16, activation_checkpointing_every=every))
    written = watched_copies(offloaded)
    gradients: set[tuple[int, str]] = set()
    update = offloaded.executor._update

    def watched(group: int) -> None:
        gradients.update((group, name) for name in offloaded.executor._gradients[group])
        update(group)

    with patch.object(offloaded.executor, "_update", watched):
        assert steps_of(plain, training) == steps_of(offloaded, other)
    named = dict(training.model.named_parameters())
    frozen = 0
    for index, layout in enumerate(offloaded.store.layouts):
        for name, stored in offloaded.store.stored(index).items():
            full = f"backbone.layers.{KEPT[case][0].group_layers[index]}.{name}"
            assert torch.equal(stored["weight"], named[full]), name
            assert torch.equal(stored["weight"], first[full]) == (name in layout.frozen)
            assert ((index, name) in gradients) == (name in layout.trained) == ("exp_avg" in stored)
            frozen += name in layout.frozen
            start = stored["weight"].data_ptr()
            assert any(a <= start < b for a, b in written) == (name in layout.trained)
    resting = {name: one for name, one in other.model.named_parameters() if not one.is_meta}
    assert bool(frozen) == (case != "all")
    assert all(torch.equal(one, named[name]) for name, one in resting.items())
    assert {id(one) for one in offloaded.parameters} == {id(one) for one in resting.values() if one.requires_grad}


def watched_copies(train_step: OffloadedTrainStep) -> list[tuple[int, int]]:
    """The addresses of host memory, from and to, that will be written back."""
    found: list[tuple[int, int]] = []
    stream = train_step.store.streams.to_host

    def copy(target: Tensor, source: Tensor) -> None:
        found.append((target.data_ptr(), target.data_ptr() + target.nbytes))
        target.copy_(source)

    stream.copy = copy  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("case", KEPT)
def test_frozen_layers_are_only_read_however_late_copies_come(case: str) -> None:
    def run(streams: Streams | None = None, **changes: Any) -> tuple[list[float], list[Tensor]]:
        training = training_of(case)
        train_step = opened(training, config_of(2, **changes), streams)
        if isinstance(streams, WatchedStreams):
            streams.watch(train_step.store, train_step.rule.read_slots)
        losses = steps_of(train_step, training)
        train_step.store.synchronize()
        return losses, [stored.clone() for stored in train_step.store.storage]

    expected, watched = run(num_gpu_layers="auto"), WatchedStreams()
    assert_same(expected, run(watched))
    assert not watched.clashes
    for changes in ({}, {"num_gpu_layers": 1, "activation_checkpointing_every": 2}, {"buffers": 3}):
        assert_same(expected, run(late_streams(True, True), **changes))
    assert run(gradient_accumulation_steps=2)[0] == pytest.approx(expected[0], rel=1e-3)


def test_the_backward_pass_ends_before_layers_that_have_nothing_to_train() -> None:
    training = training_of("last layer")
    train_step = OffloadedTrainStep(training, config_of())
    opened_groups: list[int] = []
    open_record = train_step.store.open

    def watched(index: int) -> Any:
        opened_groups.append(index)
        return open_record(index)

    train_step.store.open = watched  # type: ignore[method-assign]
    steps_of(train_step, training, 2)
    assert opened_groups == [0, 1, 2, 3, 3] * 2
    with torch.no_grad(), patch("openm6.offload.executor.capture_precision") as kept:
        training.words(training.batch(3).words)
    assert not kept.called  # without a backward pass, no inputs of layers are kept for one


@pytest.fixture
def exact_sums() -> Iterator[None]:
    """Sums in a fixed order, also on a GPU, so that runs may be compared to the bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@on_each_device
@pytest.mark.parametrize("compiles", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("bytes_per_parameter", [2, 1])
def test_on_its_device_offloaded_is_resident_in_half_precision(
    device: torch.device, compiles: bool, bytes_per_parameter: int, exact_sums: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pinned memory and copies on streams of their own; compiled blocks are close to those that are not."""
    if compiles and device == CPU:  # without the minutes that the compiler takes
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def run(**changes: Any) -> tuple[list[float], list[Tensor]]:
        config = config_of(bytes_per_parameter, **changes).model_copy(update={"precision": "bf16"})
        return offloaded_run(PLAIN, config, device=device)

    on_device = run(num_gpu_layers="auto", compile=compiles)
    assert_same(on_device, run(compile=compiles))
    assert_same(on_device, run(compile=compiles, num_gpu_layers=1, buffers=3, activation_storage="host"))
    assert on_device[0] == pytest.approx(run()[0], rel=0.02)


class NoGradient(torch.autograd.Function):
    """The value as it is; its backward pass fails, as one of a compiled block that cannot be launched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: out of resource\nmore")


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_compiled_blocks_that_fail_run_uncompiled(
    fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a step, which goes on to the bit as without a compiler, and says so once."""

    def failing(block: Any, weights: Any, x: Tensor, context: Any, layer: int) -> Any:
        if fails == "forward":
            raise RuntimeError("Triton Error [CUDA]: out of resource\nmore")
        y, stats = run_block(block, weights, x, context, layer)
        return NoGradient.apply(y), stats

    monkeypatch.setattr(torch, "compile", lambda block: failing)
    changes = {"gradient_accumulation_steps": 2, "activation_checkpointing_every": 2}
    found = offloaded_run(PLAIN, config_of(compile=True, **changes))
    assert_same(offloaded_run(PLAIN, config_of(**changes)), found)
    (line,) = [message for message in caplog.messages if message.startswith("the compiler failed")]
    assert "out of resource" in line and "loop.offload.compile=false" in line and "\n" not in line


LAYOUTS = [
    (PLAIN, {}),
    (SHARED, {}),
    (PLAIN, {"buffers": 3}),
    (PLAIN, {"num_gpu_layers": 1, "activation_checkpointing_every": 2}),
]


@pytest.mark.parametrize(("inward", "outward"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("backbone", "changes"), LAYOUTS)
def test_copies_as_late_as_their_waits_allow_change_nothing(
    backbone: BackboneConfig, changes: dict[str, Any], inward: bool, outward: bool
) -> None:
    """Without a wait for arrival, for a free buffer, or for the way home, the same bytes come out wrong every time."""
    expected = offloaded_run(backbone, config_of(num_gpu_layers="auto"))
    assert_same(expected, offloaded_run(backbone, config_of(**changes), late_streams(inward, outward)))


@pytest.mark.parametrize(("backbone", "changes"), LAYOUTS)
def test_streams_never_touch_the_same_bytes_without_an_order(backbone: BackboneConfig, changes: dict[str, Any]) -> None:
    training, streams = WordsTraining(backbone), WatchedStreams()
    train_step = opened(training, config_of(**changes), streams)
    streams.watch(train_step.store, train_step.rule.read_slots)
    for step in range(1, 4):
        steps_of(train_step, training, 1)
        with torch.no_grad():
            training.words(training.batch(step).words)
    assert train_step.store.moved_bytes > 0 and not streams.clashes


@pytest.mark.parametrize("buffers", [2, 4])
@pytest.mark.parametrize("where", ["use", "update"])
def test_a_pass_that_breaks_off_leaves_sets_as_they_were(
    where: str, buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a buffer was half changed, and where the set in it is still on its way home."""
    training, streams = WordsTraining(PLAIN), WatchedStreams()
    train_step = opened(training, config_of(buffers=buffers), streams)
    streams.watch(train_step.store, train_step.rule.read_slots)
    words = training.batch(7).words
    steps_of(train_step, training, 1)
    with monkeypatch.context() as broken:
        target: Any = train_step.executor if where == "use" else train_step.rule
        broken.setattr(target, "_run_block" if where == "use" else "update", breaks_off)
        with pytest.raises(InterruptedError):
            steps_of(train_step, training, 1)
    broken_sets = [stored.clone() for stored in train_step.store.storage]
    with torch.no_grad():
        answer = training.words(words)[0]
    assert all(torch.equal(a, b) for a, b in zip(broken_sets, train_step.store.storage, strict=True))
    train_step.store.invalidate()
    with torch.no_grad():
        assert torch.equal(training.words(words)[0], answer)
    assert not streams.clashes


def breaks_off(*given: Any) -> None:
    """Spoils the tensors of a set that it is given, and raises."""
    for tensor in given[0].values() if isinstance(given[0], dict) else ():
        tensor.zero_()
    raise InterruptedError


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = (offloaded_run(PLAIN, config_of(16, gradient_accumulation_steps=count)) for count in (1, 3))
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)


def test_micro_batches_hold_all_rows() -> None:
    meta = causal_meta(5, 8)
    parts = [part.parts() for _, part in _row_parts(meta, 3)]
    assert len(parts) == 3
    assert all(torch.equal(torch.cat(one), whole) for *one, whole in zip(*parts, meta.parts(), strict=True))


@on_each_device
def test_the_blocks_of_micro_batches_get_the_mask_of_their_device(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    attend = attention.attend

    def watched(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        seen.append(type(mask).__name__)
        return attend(query, key, value, mask)

    monkeypatch.setattr(attention, "attend", watched)
    offloaded_run(PLAIN, config_of(2, gradient_accumulation_steps=2), device=device)
    assert set(seen) == {"tuple" if device == CPU else "BlockMask"}


def test_a_set_is_fetched_once_for_all_micro_batches_and_a_shared_one_once_a_pass() -> None:
    moved = {}
    for name, backbone, micro in (("one", PLAIN, 1), ("many", PLAIN, 4), ("shared", SHARED, 1)):
        training = WordsTraining(backbone)
        train_step = OffloadedTrainStep(training, config_of(gradient_accumulation_steps=micro))
        steps_of(train_step, training, 1)
        moved[name] = train_step.store.moved_bytes
    assert moved["one"] == moved["many"]
    assert moved["shared"] < 0.6 * moved["one"]  # both sets fit the buffers: there is nothing to fetch twice


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    training = WordsTraining(PLAIN, spoilt=(2,))
    train_step = OffloadedTrainStep(training, config_of())
    train_step.update(training.batch(0), 1, 10)
    before = [stored.clone() for stored in train_step.store.storage]
    report = train_step.update(training.batch(1), 2, 10)
    assert not report.applied
    assert all(torch.equal(a, b) for a, b in zip(before, train_step.store.storage, strict=True))


def test_two_backward_passes_of_one_step_are_refused() -> None:
    training = WordsTraining(PLAIN)
    train_step = OffloadedTrainStep(training, config_of())
    with pytest.raises(RuntimeError, match="begin_step"):
        training.loss(training.batch(0))
    train_step.executor.begin_step(1, 0.01, 0.0, 0)
    loss = training.loss(training.batch(0)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="were updated in this step"):
        loss.backward()


def test_judging_and_answering_use_the_streamed_weights() -> None:
    training = WordsTraining(PLAIN)
    words = training.batch(7).words
    with torch.no_grad():
        expected = training.words(words)[0]
        OffloadedTrainStep(training, config_of(16))
        assert torch.equal(training.words(words)[0], expected)


class Killed(BaseException):
    """What a kill would be."""


def run_config(**changes: Any) -> LoopConfig:
    values = {"steps": 10, "save_every": 4, "offload": OffloadConfig(num_gpu_layers=1)}
    optimizer = OptimizerConfig(learning_rate=0.01, precision=PRECISION_OF_BYTES[changes.pop("bytes", 2)])
    return words_config(**{**values, "optimizer": optimizer, **changes})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("bytes_per_parameter", [2, 1])
def test_a_run_killed_in_the_middle_of_saving_resumes_as_if_unbroken(
    tmp_path: Path, bytes_per_parameter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(WordsTraining(PLAIN), run_config(bytes=bytes_per_parameter), RunFolder.open(tmp_path / "whole"))
    shards = OffloadedTrainStep.shards

    def interrupted(self: OffloadedTrainStep) -> Any:
        for index, shard in enumerate(shards(self)):
            if self.training.first_saved and index == 2:  # type: ignore[attr-defined]
                raise Killed
            yield shard
        self.training.first_saved = True  # type: ignore[attr-defined]

    training = WordsTraining(PLAIN)
    training.first_saved = False  # type: ignore[attr-defined]
    monkeypatch.setattr(OffloadedTrainStep, "shards", interrupted)
    broken = RunFolder.open(tmp_path / "broken")
    with pytest.raises(Killed):
        train(training, run_config(bytes=bytes_per_parameter), broken)
    monkeypatch.undo()
    assert latest(broken.path).name == "step-4"
    train(WordsTraining(PLAIN), run_config(bytes=bytes_per_parameter), broken, resume=True)
    assert bytes_of(latest(broken.path)) == bytes_of(latest(tmp_path / "whole"))


def test_a_giant_goes_from_pseudo_to_real(tmp_path: Path) -> None:
    stages = StagesConfig(switch=SwitchConfig(step=5), warmup_steps=2)
    run = RunFolder.open(tmp_path)
    train(WordsTraining(SHARED), run_config(stages=stages, save_every=5), run)
    pseudo, real = (WordsTraining(backbone) for backbone in (SHARED, PLAIN))
    load_model(step_folder(run.checkpoints, 5), pseudo.model)  # a plain model reads the shards
    load_model(step_folder(run.checkpoints, 10), real.model)
    train(WordsTraining(SHARED), run_config(stages=stages, save_every=5, steps=12), run, resume=True)


def test_answers_are_the_same_at_the_switch() -> None:
    training = WordsTraining(SHARED)
    train_step = OffloadedTrainStep(training, config_of())
    steps_of(train_step, training)
    words = training.batch(8).words
    with torch.no_grad():
        before = training.words(words)[0]
        train_step.delink("independent")
        assert torch.equal(training.words(words)[0], before)
    steps_of(train_step, training)
    row = train_step.store.stored(0)["attention.qkv"]["row_var"]
    assert row.mean() > 0 and train_step.num_shards == 4


def test_noise_on_shared_routers_is_that_of_resident_training() -> None:
    routers = []
    for opened in (TrainStep, OffloadedTrainStep):
        training = WordsTraining(words_backbone(sharing="all", share_routers=True, moe_layer_freq=1, dense=None))
        opened(training, config_of() if opened is OffloadedTrainStep else words_config()).delink("reset", noise=0.1)
        routers.append([block.router.weight.detach() for block in training.words.backbone.blocks if block.router])
    assert not torch.equal(routers[0][0], routers[0][1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*routers, strict=True))


def test_a_checkpoint_of_another_tier_is_refused(tmp_path: Path) -> None:
    train(WordsTraining(PLAIN), run_config(steps=2), RunFolder.open(tmp_path))
    with pytest.raises(
        CheckpointError,
        match="holds weights of precision bf16-adafactor, this run trains int8-adafactor: convert it",
    ):
        train(WordsTraining(PLAIN), run_config(bytes=1), RunFolder(tmp_path), resume=True)


def test_what_cannot_be_streamed_is_refused() -> None:
    class Blockless(WordsTraining):
        backbone = None  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="no blocks to offload"):
        OffloadedTrainStep(Blockless(PLAIN), config_of())
    with pytest.raises(ConfigError, match="lists 9: there are only 0 to 3"):
        OffloadedTrainStep(WordsTraining(PLAIN), config_of(num_gpu_layers=(9,)))


def test_weights_on_meta_get_first_values_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    training = WordsTraining(PLAIN)
    for block in training.words.backbone.blocks:
        for module in block.shareable().values():
            module.to("meta")
    train_step = OffloadedTrainStep(training, config_of(16))
    first, third = (train_step.store.stored(index)["attention.qkv"]["weight"] for index in (0, 2))
    assert float(first.std()) == pytest.approx(PLAIN.deviation, rel=0.1) and not torch.equal(first, third)
    assert steps_of(train_step, training)[-1] > 0
