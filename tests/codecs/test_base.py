"""Quantizers: normalized latents, groups, residual stages, and what their health says."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from openm6.codecs.base import GroupedQuantizer, LatentNorm, QuantizerConfig, ResidualQuantizer, VectorQuantizer

CONFIG = QuantizerConfig(groups=3, levels=(5, 4))


def latent(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", [(), (1, 5), (64, 32)])
def test_levels_out_of_bounds_are_refused_with_an_example(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="8, 5, 5, 5"):
        QuantizerConfig(groups=1, levels=levels)


def test_sizes_follow_from_groups_and_levels() -> None:
    assert (CONFIG.codebook_size, CONFIG.vector_size) == (20, 6)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        QuantizerConfig(groups=0)


def test_the_norm_gives_unit_variance_while_training_and_remembers_it() -> None:
    norm = LatentNorm(2, momentum=0.5)
    z = latent(400, 2) * torch.tensor([30.0, 0.01]) + torch.tensor([5.0, -3.0])
    for _ in range(40):
        out = norm(z)
    assert torch.allclose(out.mean(0), torch.zeros(2), atol=1e-4)
    assert math.isclose(float(out[:, 0].std()), 1.0, rel_tol=0.01)
    norm.eval()
    assert torch.allclose(norm(z), out, atol=1e-2)


def test_a_frozen_norm_keeps_its_statistics() -> None:
    norm = LatentNorm(2)
    norm.frozen = True
    z = latent(50, 2) * 9
    assert torch.allclose(norm(z), z, rtol=1e-4)
    assert torch.equal(norm.mean, torch.zeros(2)) and torch.equal(norm.variance, torch.ones(2))


def test_grouped_codes_give_back_the_latent_that_the_decoder_was_trained_on() -> None:
    quantizer = GroupedQuantizer(CONFIG).eval()
    quantized = quantizer(latent(2, 4, 4, 6))
    assert quantized.codes.shape == (2, 4, 4, 3)
    assert 0 <= quantized.codes.min() and quantized.codes.max() < 20
    assert torch.allclose(quantizer.latent_of(quantized.codes), quantized.latent, atol=1e-6)


def test_groups_do_not_touch_each_other() -> None:
    quantizer = GroupedQuantizer(CONFIG).eval()
    z = latent(1, 5, 6)
    other = z.clone()
    other[..., 2:4] = latent(1, 5, 2, seed=1)
    same = quantizer(z).codes == quantizer(other).codes
    assert same[..., 0].all() and same[..., 2].all() and not same[..., 1].all()


def test_residual_codes_give_back_the_latent_and_fewer_stages_a_coarser_one() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(CONFIG, channels=5).eval()
    quantized = quantizer(latent(2, 7, 5))
    assert quantized.codes.shape == (2, 7, 3)
    assert torch.allclose(quantizer.latent_of(quantized.codes), quantized.latent, atol=1e-5)
    first = quantizer.latent_of(quantized.codes[..., :1])
    by_hand = quantizer.out[0](
        GroupedQuantizer(QuantizerConfig(groups=1, levels=(5, 4))).latent_of(quantized.codes[..., :1])
    )
    assert torch.allclose(first, by_hand, atol=1e-6)


def test_a_later_stage_sees_what_the_earlier_ones_left() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(QuantizerConfig(groups=2, levels=(5, 4)), channels=2, dropout=0.0).eval()
    z = latent(1, 300, 2)
    before = quantizer(z).codes
    with torch.no_grad():
        quantizer.out[0].weight.mul_(-1.0)
    after = quantizer(z).codes
    assert torch.equal(before[..., 0], after[..., 0])
    assert not torch.equal(before[..., 1], after[..., 1])


def test_trained_stages_refine_each_other() -> None:
    """With every stage trained, more stages mean a smaller error: what residual quantizing is for."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(QuantizerConfig(groups=3, levels=(5, 5)), channels=3)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
    for step in range(150):
        z = latent(16, 16, 3, seed=step)
        loss = (quantizer(z).latent - z).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    quantizer.eval()
    z = latent(16, 16, 3, seed=999)
    codes = quantizer(z).codes
    with torch.no_grad():
        errors = [float((quantizer.latent_of(codes[..., :n]) - z).square().mean()) for n in (1, 2, 3)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.2 * errors[2]


def test_gradients_reach_the_encoder_through_every_stage() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(CONFIG, channels=5, dropout=0.0)
    z = latent(2, 7, 5).requires_grad_()
    quantizer(z).latent.square().sum().backward()
    assert z.grad is not None and (z.grad.abs().sum((0, 1)) > 0).all()
    for stage in quantizer.into:
        assert stage.weight.grad.abs().sum() > 0


def test_dropout_of_stages_leaves_the_first_and_only_while_training() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(CONFIG, channels=5, dropout=1.0)
    for norm in quantizer.norms:
        norm.frozen = True
    z = latent(64, 3, 5)
    found = quantizer(z)
    first = [quantizer.latent_of(found.codes[..., :stages]) for stages in (1, 2, 3)]
    kept = torch.stack([(found.latent - part).abs().amax((1, 2)) < 1e-5 for part in first])  # 3 B
    assert (kept.sum(0) == 1).all() and kept.any(1).all(), "each row has its first one, two or three stages"
    assert torch.allclose(quantizer.eval()(z).latent, first[2], atol=1e-5)


def test_health_tells_a_live_latent_from_a_dead_one() -> None:
    quantizer = GroupedQuantizer(CONFIG)
    quantizer.norm.frozen = True
    alive = quantizer(latent(64, 16, 6)).health
    assert alive.saturated < 0.05 and (alive.bits > 0.8 * alive.capacity).all()
    dead = quantizer(latent(64, 16, 6) * 60).health  # what an unnormalized encoder arrives at
    assert dead.saturated > 0.9 and (dead.bits < 0.6 * dead.capacity).all() and dead.mean_magnitude > 20
    assert torch.allclose(dead.capacity[:2], torch.tensor([5.0, 4.0]).log2())


def trained_vectors(rows: torch.Tensor, size: int, passes: int = 150) -> VectorQuantizer:
    quantizer = VectorQuantizer(2, size, rows.shape[-1], dropout=0.5).train()
    for _ in range(passes):
        quantizer(rows)
    return quantizer.eval()


def test_vectors_of_a_codebook_are_the_nearest_and_give_back_the_latent() -> None:
    quantizer = trained_vectors(latent(8, 20, 5), 32)
    z = latent(2, 7, 5, seed=1)
    quantized = quantizer(z)
    assert quantized.codes.shape == (2, 7, 2) and 0 <= quantized.codes.min() and quantized.codes.max() < 32
    assert torch.allclose(quantizer.latent_of(quantized.codes), quantized.latent, atol=1e-5)
    wanted = 2 * torch.sigmoid(1.6 * quantizer.norm(z)) - 1
    for stage in range(2):
        code = torch.cdist(wanted, quantizer.codebooks[stage][None]).argmin(-1)
        assert torch.equal(code, quantized.codes[..., stage])
        wanted = wanted - quantizer.codebooks[stage][code]
    first = quantizer.latent_of(quantized.codes[..., :1])
    assert torch.equal(first, quantizer.codebooks[0][quantized.codes[..., 0]])


def test_unused_vectors_are_replaced_until_all_points_of_a_latent_are_found() -> None:
    points = latent(16, 4)
    rows = points[torch.arange(320) % 16].view(1, 320, 4)
    quantizer = trained_vectors(rows, 32, passes=1200)
    exact = 2 * torch.sigmoid(1.6 * quantizer.norm(points[None])) - 1
    distance = torch.cdist(exact, quantizer.codebooks[0][None])[0]
    assert distance.min(1).values.max() < 0.01


@pytest.mark.parametrize("kind", [GroupedQuantizer, VectorQuantizer])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_pass_that_is_not_finite_leaves_nothing_behind(kind: type, broken: float) -> None:
    torch.manual_seed(0)
    quantizer = kind(CONFIG) if kind is GroupedQuantizer else kind(2, 8, 6)
    quantizer(latent(4, 9, 6))
    before = {name: one.clone() for name, one in quantizer.state_dict().items()}
    bad = latent(4, 9, 6)
    bad[0, 0] = broken
    quantizer(bad)
    assert before and all(torch.equal(one, before[name]) for name, one in quantizer.state_dict().items())


def test_the_gradient_passes_codebooks_straight_through_and_the_commitment_pulls() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(1, 8, 3)
    quantizer.norm.frozen = True
    z = latent(1, 40, 3).requires_grad_()
    quantized = quantizer(z)
    y = 2 * torch.sigmoid(1.6 * quantizer.norm(z)) - 1
    (straight,) = torch.autograd.grad(quantized.latent.sum(), z, retain_graph=True)
    assert torch.allclose(straight, torch.autograd.grad(y.sum(), z, retain_graph=True)[0])
    assert isinstance(quantized.commitment, torch.Tensor)
    (pull,) = torch.autograd.grad(quantized.commitment, z)
    moved = 2 * torch.sigmoid(1.6 * quantizer.norm(z - 0.1 * pull)) - 1
    target = quantized.latent.detach()
    assert (moved - target).square().sum() < (y - target).square().sum()
