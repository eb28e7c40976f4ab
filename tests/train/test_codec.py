"""Training codecs: the latent stays alive, runs resume exactly, the best average is written, guards stop dead runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openm6.codecs.base import QuantizerStats
from openm6.codecs.registry import load_codec
from openm6.core.config import apply_overrides, build, read_yaml
from openm6.core.errors import ConfigError, DataError, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.train.audio_codec import AudioCodecRecipe, AudioSubject
from openm6.train.codec import CODEC_FILE, SCORES_FILE, CodecBatch, CodecTraining, hold_out
from openm6.train.image_codec import ImageCodecRecipe, ImageSubject
from openm6.train.loop import train

RECIPES = Path(__file__).parents[2] / "openm6" / "recipes"
CPU = torch.device("cpu")


def image_recipe(**changes: object) -> ImageCodecRecipe:
    values: dict[str, object] = {
        "sources": {"emoji": {"kind": "embedded", "name": "emoji", "limit": 24}},
        "codec": {"groups": 2, "widths": [16], "encoder_blocks": [1], "decoder_blocks": [1]},
        "data": {"batch": 6, "sides": {32: 1.0}},
        "held_out": 8,
        "loop": {"steps": 6, "save_every": 3, "evaluate_every": 2, "tensorboard": False, "log_every": 3},
    }
    return build(ImageCodecRecipe, values | changes, "the test")


def image_training(**changes: object) -> CodecTraining:
    recipe = image_recipe(**changes)
    return CodecTraining(recipe, ImageSubject(recipe, CPU), CPU)


def test_a_run_writes_a_codec_that_loads_and_its_scores(tmp_path: Path) -> None:
    training = image_training()
    result = train(training, training.recipe.loop, RunFolder.open(tmp_path))
    codec = load_codec(tmp_path / CODEC_FILE)
    assert codec.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 8, 2)
    scores = json.loads((tmp_path / SCORES_FILE).read_text())
    assert scores["held_out"]["psnr"] == pytest.approx(training.best_score)
    assert set(scores["test"]) == {"emoji_32"} and scores["test"]["emoji_32"]["psnr"] > 0
    assert result.scores["psnr"] <= training.best_score


def test_training_starts_from_the_weights_of_a_codec_of_the_same_shape(tmp_path: Path) -> None:
    before = image_training()
    train(before, before.recipe.loop, RunFolder.open(tmp_path))
    start = tmp_path / CODEC_FILE
    further, saved = image_training(start=str(start)), load_codec(start)
    for codec in (further.codec, further.averaged):
        assert all(torch.equal(own, saved.state_dict()[name]) for name, own in codec.state_dict().items())
    assert further.codec.training and all(own.requires_grad for own in further.codec.parameters())
    with pytest.raises(ConfigError, match="another shape than codec"):
        image_training(start="image-64")


CODEBOOKS = {"groups": 2, "codebook": 16, "latent": 8, "widths": [16], "encoder_blocks": [1], "decoder_blocks": [1]}


def test_codebooks_start_from_the_networks_of_a_codec_without(tmp_path: Path) -> None:
    before = image_training()
    train(before, before.recipe.loop, RunFolder.open(tmp_path))
    start = str(tmp_path / CODEC_FILE)
    further = image_training(start=start, codec=CODEBOOKS)
    own = further.codec.state_dict()
    assert all(torch.equal(own[name], one) for name, one in load_codec(start).state_dict().items())
    train(further, further.recipe.loop, RunFolder.open(tmp_path / "further"))
    codec = load_codec(tmp_path / "further" / CODEC_FILE)
    assert codec.vectors().shape == (2, 16, 8) and codec.vectors().abs().sum(-1).min() > 0
    assert codec.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 8, 2)
    scores = json.loads((tmp_path / "further" / SCORES_FILE).read_text())
    assert 0 < scores["held_out"]["bits"] <= 8
    with pytest.raises(ConfigError, match="another shape than codec"):
        image_training(start=start, codec=CODEBOOKS | {"latent": 9})


@pytest.mark.parametrize("changes", [{}, {"codec": CODEBOOKS}], ids=["fsq", "codebooks"])
def test_a_resumed_run_writes_the_same_codec_bit_for_bit(changes: dict[str, object], tmp_path: Path) -> None:
    whole = image_training(**changes)
    train(whole, whole.recipe.loop, RunFolder.open(tmp_path / "whole"))
    cut = image_training(**changes)
    _stop_after(cut, 4)
    with pytest.raises(KeyboardInterrupt):
        train(cut, cut.recipe.loop, RunFolder.open(tmp_path / "cut"))
    again = image_training(**changes)
    train(again, again.recipe.loop, RunFolder.open(tmp_path / "cut"), resume=True)
    assert (tmp_path / "cut" / CODEC_FILE).read_bytes() == (tmp_path / "whole" / CODEC_FILE).read_bytes()
    assert again.updates == whole.updates == 6


def _stop_after(training: CodecTraining, steps: int) -> None:
    """Cuts a run between two checkpoints, as a crash would."""
    plain = training.loss

    def loss(batch: CodecBatch) -> object:
        if batch.step > steps:
            raise KeyboardInterrupt
        return plain(batch)

    training.loss = loss  # type: ignore[method-assign, assignment]


def heat(training: CodecTraining, steps: int) -> list[float]:
    """Losses of plain steps at 0.016, twice the recipes' rule of 0.002 · 64 / width for a width of 16."""
    training.model.train()
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.016, betas=(0.9, 0.99))
    losses = []
    for step in range(1, steps + 1):
        result = training.loss(CodecBatch(step, 1))
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        optimizer.step()
        losses.append(result.loss.item())
    return losses


def test_the_latent_stays_alive_at_twice_the_rate_and_would_not_without_its_norm() -> None:
    codec = {"groups": 4, "widths": [16, 16], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}
    training = image_training(codec=codec, loop={"steps": 1000})
    losses = heat(training, 80)
    assert training.health is not None
    training.evaluate(1000)
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    # Statistics frozen as they begin.
    bare = image_training(codec=codec, loop={"steps": 1000}, settle_fraction=1.0)
    heat(bare, 40)
    assert bare.health is not None
    assert bare.health.saturated > 2 * training.health.saturated


def health(saturated: float, bits: tuple[float, ...]) -> QuantizerStats:
    return QuantizerStats(torch.tensor(1.0), torch.tensor(saturated), torch.tensor(bits), torch.tensor([3.0, 2.0]))


def test_a_saturated_or_starved_latent_stops_the_run_with_the_fix() -> None:
    training = image_training()
    training.health = health(0.05, (2.9, 1.9))
    training.evaluate(1000)
    training.health = health(0.97, (2.9, 1.9))
    with pytest.raises(TrainingError, match=r"97% of the latent is saturated.*learning_rate"):
        training.evaluate(1000)
    training.health = health(0.05, (2.9, 0.9))
    with pytest.raises(TrainingError, match=r"channel 1 of the latent carries 45% of its bits"):
        training.evaluate(1000)


def test_guards_wait_for_their_step() -> None:
    training = image_training(guard_from=10)
    training.health = health(0.97, (2.9, 1.9))
    training.evaluate(10)
    with pytest.raises(TrainingError, match="saturated"):
        training.evaluate(11)


def test_health_goes_into_the_metrics() -> None:
    metrics = image_training().loss(CodecBatch(1, 1)).metrics
    assert set(metrics) == {
        "latent/mean_magnitude",
        "latent/saturated",
        "latent/bits",
        "latent/poorest_channel",
    }


def test_statistics_freeze_in_the_last_part_only() -> None:
    training = image_training(settle_fraction=0.5)
    norm = training.codec.latent_norms()[0]
    training.model.train()
    training.loss(CodecBatch(3, 1))
    before = norm.mean.clone()
    assert not norm.frozen and before.abs().sum() > 0
    training.loss(CodecBatch(4, 1))
    assert norm.frozen and torch.equal(norm.mean, before)


def test_the_average_follows_the_weights_by_the_stated_rule() -> None:
    training = image_training()
    name = "decoder.0.weight"
    first = training.averaged.state_dict()[name].clone()
    with torch.no_grad():
        training.codec.state_dict()[name].add_(1.0)
    training.after_step(training.loss(CodecBatch(1, 1)))
    keep = 2 / 11
    assert torch.allclose(training.averaged.state_dict()[name], first + (1 - keep), atol=1e-6)
    training.updates = 10**6
    now = training.averaged.state_dict()[name].clone()
    training.after_step(training.loss(CodecBatch(2, 1)))
    expected = now.lerp(training.codec.state_dict()[name], 1 - 0.999)
    assert torch.allclose(training.averaged.state_dict()[name], expected, atol=1e-6)


def test_the_best_average_is_kept_when_later_ones_are_worse() -> None:
    training = image_training()
    scores = iter([{"psnr": 20.0}, {"psnr": 25.0}, {"psnr": 21.0}])
    training.subject.held_out_scores = lambda codec: next(scores)  # type: ignore[method-assign]
    name = "decoder.0.bias"
    for step in range(3):
        training.averaged.state_dict()[name].fill_(float(step))
        training.evaluate(step)
    assert training.best_score == 25.0
    assert (training.best.state_dict()[name] == 1.0).all()


def test_state_survives_a_round_trip_before_and_after_the_first_score() -> None:
    for score in (None, 12.5):
        training, other = image_training(), image_training()
        training.best_score, training.updates = score, 7
        training.averaged.state_dict()["decoder.0.bias"].fill_(3.0)
        state = training.state()
        json.dumps(
            {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)},
            allow_nan=False,
        )
        other.load_state(state)
        assert (other.best_score, other.updates) == (score, 7)
        assert (other.averaged.state_dict()["decoder.0.bias"] == 3.0).all()


def test_held_out_files_are_never_trained_on() -> None:
    files = {"a": [bytes([n]) for n in range(10)], "b": [b"x", b"y"]}
    kept, held = hold_out(files, 4)
    assert held == [b"\x01", b"\x05", b"\x09", b"y"]
    assert not set(held) & {raw for part in kept.values() for raw in part}
    assert sum(map(len, kept.values())) + len(held) == 12


def test_a_source_without_images_is_named() -> None:
    with pytest.raises(DataError, match=r"source 'poems' has no usable image"):
        image_training(sources={"poems": {"kind": "embedded", "name": "poems_zh", "limit": 4}})


def test_a_single_record_is_not_enough() -> None:
    kept, held = hold_out({"a": [b"x"], "b": [b"y", b"z"]}, 4)
    assert (kept, held) == ({"a": [b"x"], "b": [b"y"]}, [b"z"])
    with pytest.raises(DataError, match="no source has two records"):
        hold_out({"a": [b"x"]}, 4)


def test_broken_images_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(_embedded_image())
    training = image_training(sources={"mine": {"kind": "folder", "path": str(tmp_path), "test_fraction": 0.0}})
    subject = training.subject
    assert isinstance(subject, ImageSubject)
    assert len(subject.held_out) == 1 and len(subject.images[32]) == 1
    assert "source 'mine', record 0 is left out" in caplog.text


def _embedded_image() -> bytes:
    source = image_recipe().sources["emoji"].open("emoji", "train", lambda name: pytest.fail(name))
    return source[0]["image"]


def test_mistakes_in_a_recipe_are_named_with_the_fix() -> None:
    for changes, message in (
        ({"loop": {"steps": "auto", "minutes": 1.0}}, "loop.steps must be a number"),
        ({"data": {"sides": {30: 1.0}}}, "30 must be a multiple of 4"),
        ({"data": {"source_weights": {"emojis": 1.0}}}, "did you mean 'emoji'"),
        ({"dat": {}}, "did you mean 'data'"),
    ):
        with pytest.raises(ConfigError, match=message):
            image_recipe(**changes)


@pytest.mark.parametrize(("name", "stride"), [("codec-image-64", 8), ("codec-image-256", 4)])
def test_the_recipes_of_the_shipped_image_codecs_are_valid(name: str, stride: int) -> None:
    recipe = build(ImageCodecRecipe, read_yaml(RECIPES / f"{name}.yaml"), name)
    assert recipe.codec.stride == stride and recipe.codec.codebook_size == 1000


def test_an_audio_codec_trains_and_is_written(tmp_path: Path) -> None:
    changes = [
        "loop.steps=3", "loop.save_every=3", "loop.tensorboard=false", "data.batch=4", "data.seconds=0.24",
        "codec.width=16", "codec.encoder_blocks=1", "codec.decoder_blocks=1", "sources.digits.limit=8", "held_out=4",
    ]  # fmt: skip
    values = apply_overrides(read_yaml(RECIPES / "codec-audio.yaml"), changes)
    recipe = build(AudioCodecRecipe, values, "codec-audio")
    train(CodecTraining(recipe, AudioSubject(recipe, CPU), CPU), recipe.loop, RunFolder.open(tmp_path))
    assert load_codec(tmp_path / CODEC_FILE).encode(torch.zeros(1, 16000)).shape == (1, 25, 4)
    assert json.loads((tmp_path / SCORES_FILE).read_text())["test"]["digits"]["log_mel_l1"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_codec_trains_on_the_gpu_in_half_precision(tmp_path: Path) -> None:
    recipe = image_recipe()
    device = torch.device("cuda")
    train(CodecTraining(recipe, ImageSubject(recipe, device), device), recipe.loop, RunFolder.open(tmp_path))
    assert load_codec(tmp_path / CODEC_FILE).encode(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 8, 2)
