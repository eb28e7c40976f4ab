"""What images and audio share: patches as input; as output a grid of codec codes, masked and predicted in parallel.

Training masks a random fraction of the positions (MaskGIT, arXiv 2202.04200, section 3.1); decoding predicts them in a
few steps. A position holds G codes (groups or residual stages), which a small head predicts one after the other,
p(c_1 … c_G | h) = Π_g p(c_g | h, c_<g), so that a position is drawn from one joint distribution.
"""

# Dimensions: N tokens, H and W tokens down and across, D hidden size, Q frequencies, F features of a patch, G codes per
# position, C codebook size, V numbers in the vector of one position, B bottleneck

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.codecs.base import Codec
from openm6.core.lru_cache import LRUCache
from openm6.core.seeds import content_key
from openm6.modalities.image_stem import OF_SIZE
from openm6.modalities.interface import NO_OPTIONS, OWN_ORIGIN, Adapter, Modality, Options, Rng, Segment
from openm6.ops.losses import grouped_cross_entropy

OCTAVES = (-2, -1, 0, 1, 2, 3)  # waves of 4 sides (or seconds) down to an eighth of one
# Of training masks: random, all (only there does the model depend on its inputs), a rectangle; the rest all else.
RANDOM_FRACTION, ALL_FRACTION, INSIDE_FRACTION = 0.35, 0.5, 0.075
SMOOTHING = 0.1  # of the training labels, as in MaskGIT: generalizes better to unseen voices and handwriting
WRONG_FRACTION = 0.05  # of the visible codes is replaced by random ones and learned, so that it corrects codes
BOTTLENECK = 64  # numbers in the state of one group of the head
CACHE_BYTES = 64 * 2**20  # of codes, and of what is read: a file goes through the codec once, not in every epoch
FEATURE_BYTES = 2**30  # of features of frozen encoders, the slowest to make
GROUP, WAITING = 8, 32  # images or recordings that the codec encodes at once, and that wait for it
_file_keys = LRUCache[tuple[bytes, bytes]](2**24)


def key_of(raw: Any) -> bytes | None:
    """The key of a file by its content; None if it is not a file."""
    # Python keeps the hash of bytes, so that the next lookup of the same object reads none of them.
    return _file_keys.get_or_compute(raw, lambda: (raw, content_key(raw)))[1] if isinstance(raw, bytes) else None


Input = tuple[Hashable, Callable[[], np.ndarray]]  # the key of an input of a codec, and the function that reads it
# Of inputs whose codes are computed together, by modality and key: the input, and what to do with its codes.
CodesToCome = dict[tuple["CodesModality", Hashable], tuple[np.ndarray, list[Callable[[np.ndarray], None]]]]
_codes_to_come: ContextVar[CodesToCome | None] = ContextVar("codes_to_come", default=None)


@contextmanager
def encode_together() -> Iterator[None]:
    """Within it the codes of targets may be missing; at its end they are there.

    The codec takes half as long for eight inputs at once as for one by one.
    """
    waiting: CodesToCome = {}
    token = _codes_to_come.set(waiting)
    try:
        yield
    finally:
        _codes_to_come.reset(token)
        _encode_all(waiting)


def _encode_all(waiting: CodesToCome) -> None:
    """Compute the codes of all that waits, and use them."""
    alike: dict[tuple[CodesModality, tuple[int, ...]], list[Hashable]] = {}
    for (modality, key), (values, _) in waiting.items():
        alike.setdefault((modality, values.shape), []).append(key)
    groups = [(one, keys[n : n + GROUP]) for (one, _), keys in alike.items() for n in range(0, len(keys), GROUP)]
    for modality, group in groups:
        inputs = [waiting[modality, key][0] for key in group]
        with modality.code_cache.timed():
            # Never alone: kernels for one round differently, and codes must not depend on what is beside them.
            found = modality.encode_values(inputs if len(inputs) > 1 else inputs * 2)
        for key, codes in zip(group, found, strict=False):
            modality.code_cache.put(None if isinstance(key, int) else key, codes.copy())
            for use in waiting[modality, key][1]:
                use(codes)
    waiting.clear()


class TokenGrid(NamedTuple):
    """The positions of N tokens of an image or recording; `shape` is how many there are down and across.

    `cells` (N 3) for rotary embeddings, `positions` (N 2) for Fourier features, and the `span` to the next segment.
    """

    cells: np.ndarray
    positions: np.ndarray
    shape: tuple[int, int]

    @property
    def span(self) -> int:
        return max(self.shape)


class FourierPositionEmbedding(nn.Module):
    """Waves of a position in its own image or recording, as rotary positions only encode distances.  # N 2 -> N D"""

    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([2.0**octave for octave in OCTAVES]), persistent=False)
        self.mix = nn.Linear(4 * len(OCTAVES), hidden_size)

    def forward(self, positions: Tensor) -> Tensor:
        angles = (2 * math.pi * positions[..., None] * self.frequencies).flatten(1)  # N 2 -> N 2Q
        return self.mix(torch.cat((angles.sin(), angles.cos()), -1).to(self.mix.weight.dtype))


def sample_mask(height: int, width: int, rng: Rng) -> np.ndarray:
    """Return which positions of a grid are masked for one training example; without a generator, all.  # H*W bool"""
    positions = height * width
    draw = RANDOM_FRACTION if rng is None else rng.random()
    if rng is None or RANDOM_FRACTION <= draw < RANDOM_FRACTION + ALL_FRACTION:
        return np.ones(positions, bool)
    if draw < RANDOM_FRACTION:
        count = max(1, round(positions * math.cos(math.pi / 2 * rng.random())))
        mask = np.zeros(positions, bool)
        mask[rng.permutation(positions)[:count]] = True
        return mask
    inside = random_rectangle(height, width, rng)
    mask = inside if draw < RANDOM_FRACTION + ALL_FRACTION + INSIDE_FRACTION else ~inside
    return mask if mask.any() else np.ones(positions, bool)  # a rectangle may fill a tiny grid


def random_rectangle(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a rectangle of a quarter to three quarters of each side, somewhere in the grid.  # H*W bool"""
    tall = int(rng.integers(math.ceil(height / 4), max(2, math.ceil(height * 3 / 4) + 1)))
    wide = int(rng.integers(math.ceil(width / 4), max(2, math.ceil(width * 3 / 4) + 1)))
    tall, wide = min(tall, height), min(wide, width)
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    inside = np.zeros((height, width), bool)
    inside[top : top + tall, left : left + wide] = True
    return inside.reshape(-1)


class CodesModality(Modality):
    """Patches in, masked codes of a codec out: what images and audio share."""

    codec: Codec
    code_cache: LRUCache[np.ndarray]
    patch_size: int  # numbers in a patch
    has_encoder: bool  # whose features are read in place of patches

    def _source(self, patches: np.ndarray, is_masked: np.ndarray, grid: TokenGrid, truncated: bool = False) -> Segment:
        """Patches as input tokens; masked ones become zero.  # N F, N"""
        if is_masked.any():
            patches = np.where(is_masked[:, None], np.float32(0), patches)
        arrays = {"patches": patches, "is_masked": is_masked, "positions": grid.positions}
        learn = np.zeros_like(is_masked)
        return Segment(f"{self.name}_in", arrays, grid.cells, grid.span, learn, moves=OWN_ORIGIN, truncated=truncated)

    def encode_values(self, values: list[np.ndarray]) -> np.ndarray:
        """Codes of inputs of one shape, as the codec takes them.  # B N G"""
        return self.codec.encode(torch.from_numpy(np.stack(values))).flatten(1, -2).numpy().astype(np.int32)

    def _encode(self, key: Hashable, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Codes of what `read` returns, from the cache if they are there.  # N G"""
        return self.code_cache.get_or_compute(key, lambda: self.encode_values([read()])[0])

    def _pass_codes(self, key: Hashable, read: Callable[[], np.ndarray], use: Callable[[np.ndarray], None]) -> None:
        """Call `use` with the codes of what `read` returns: now, or at the end of `encode_together`."""
        waiting = _codes_to_come.get()
        if waiting is None or key in self.code_cache.entries:
            use(self._encode(key, read))
            return
        self.code_cache.lookups += 1
        key = len(waiting) if key is None else key
        if (self, key) not in waiting:
            with self.code_cache.timed(misses=1):
                waiting[self, key] = (read(), [])
        waiting[self, key][1].append(use)
        if len(waiting) >= WAITING:
            _encode_all(waiting)

    def _target(
        self,
        grid: TokenGrid,
        of: Input | None,
        region: np.ndarray | None = None,
        options: Options = NO_OPTIONS,
        rng: Rng = None,
    ) -> Segment:
        """Target tokens `of` an input, or of zeros, masked by the training pattern, or in `region` alone.

        `mask_context` masks the codes around the region as well; without a generator only those in it carry a loss.
        Training masks the context of half the examples, and then learns all codes, to inpaint from the source alone.
        """
        if region is None:
            mask = learn = sample_mask(*grid.shape, rng)
        else:
            mask_context = (rng is not None and rng.random() < 0.5) or options.get("mask_context")
            mask = np.ones_like(region) if mask_context else region
            learn = region if rng is None else mask
        codes, shown = (np.zeros((len(mask), self.codec.config.groups), np.int64) for _ in range(2))
        if rng is not None:
            is_wrong = ~mask & (rng.random(len(mask)) < WRONG_FRACTION)
            wrong = rng.integers(0, self.codec.config.codebook_size, (int(is_wrong.sum()), codes.shape[1]))
            learn = learn | is_wrong

        def fill(found: np.ndarray) -> None:
            codes[:] = shown[:] = found
            if rng is not None:
                shown[is_wrong] = wrong

        if of is not None:
            self._pass_codes(*of, fill)
        arrays = {"codes": codes, "shown": shown, "is_masked": mask, "positions": grid.positions}
        return Segment(f"{self.name}_out", arrays, grid.cells, grid.span, learn, "block", OWN_ORIGIN)

    def stem(self, hidden_size: int) -> nn.Module:
        return nn.Linear(self.patch_size, hidden_size)

    def adapters(self, hidden_size: int) -> dict[str, Adapter]:
        position = FourierPositionEmbedding(hidden_size)
        out = CodesAdapter(position, hidden_size, self.codec.vectors())
        # Features of an encoder have positions of their own, so that another encoder changes nothing that is generated.
        own = FourierPositionEmbedding(hidden_size) if self.has_encoder else position
        patches = PatchAdapter(own, self.stem(hidden_size), hidden_size)
        return {f"{self.name}_in": patches, f"{self.name}_out": out}


class PatchAdapter(Adapter):
    """Flat patches of raw values to vectors; masked patches become one learned vector."""

    def __init__(self, position: FourierPositionEmbedding, stem: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.inner = stem
        self.outer = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.gone = nn.Parameter(torch.empty(hidden_size))
        self.place = position
        nn.init.normal_(self.gone, std=0.02)

    def hidden(self, arrays: dict[str, Tensor]) -> Tensor:
        """What the last layer projects.  # N F -> N D"""
        tables = [array for name, array in arrays.items() if name.startswith(OF_SIZE)]
        return F.gelu(self.inner(arrays["patches"].to(self.gone.dtype), *([tables] if tables else ())))

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        vectors = self.norm(self.outer(self.hidden(arrays)))
        vectors = torch.where(arrays["is_masked"][:, None], self.gone.to(vectors.dtype), vectors)
        return vectors + self.place(arrays["positions"])


class CodesAdapter(Adapter):
    """Embed visible codes by `vectors` of the codec (near codes stay near), and predict those of a position in turn."""

    earlier: Tensor
    table: Tensor
    first: Tensor

    def __init__(self, position: FourierPositionEmbedding, hidden_size: int, vectors: Tensor) -> None:
        super().__init__()
        groups, size, dims = vectors.shape
        self.groups = groups
        self.shown = nn.Linear(groups * dims, hidden_size)
        self.mask = nn.Parameter(torch.empty(hidden_size))
        # That of patches, so that the model finds a masked region by its position in the source.
        self.place = position
        self.hidden_to_groups = nn.Linear(hidden_size, groups * BOTTLENECK)
        self.codes_to_groups = nn.Linear(groups * dims, groups * BOTTLENECK, bias=False)
        self.to_codes = nn.Parameter(torch.empty(groups, BOTTLENECK, size))
        # Row block g (BOTTLENECK rows) may depend on column block j (dims columns) only if j < g.
        blocks = torch.ones(groups, groups).tril(-1)
        self.register_buffer("earlier", torch.kron(blocks, torch.ones(BOTTLENECK, dims)), persistent=False)
        self.register_buffer("table", vectors.flatten(0, 1), persistent=False)
        # A tensor made in each pass would be copied to the device again, and the host would wait for it.
        self.register_buffer("first", size * torch.arange(groups), persistent=False)
        nn.init.normal_(self.mask, std=0.02)
        nn.init.normal_(self.to_codes, std=BOTTLENECK**-0.5)

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors of the codes of a position, or of its first groups.  # N G -> N V"""
        return F.embedding(codes + self.first[: codes.shape[-1]], self.table).flatten(-2)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        vectors = self.shown(self.vectors(arrays["shown"]).to(self.shown.weight.dtype))  # N V -> N D
        vectors = torch.where(arrays["is_masked"][:, None], self.mask.to(vectors.dtype), vectors)
        return vectors + self.place(arrays["positions"])

    def group_states(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return the head's state for each group, given the codes of the groups before it.  # N D, N G -> N G B"""
        context = F.linear(self.vectors(codes).to(hidden.dtype), self.codes_to_groups.weight * self.earlier)
        return F.gelu(self.hidden_to_groups(hidden) + context).unflatten(-1, (self.groups, BOTTLENECK))

    def group_logits(self, hidden: Tensor, codes: Tensor, group: int) -> Tensor:
        """Return logits of one group's code; the codes of later groups do not matter.  # N D, N G -> N C"""
        rows = slice(group * BOTTLENECK, (group + 1) * BOTTLENECK)
        state = F.linear(hidden, self.hidden_to_groups.weight[rows], self.hidden_to_groups.bias[rows])
        if group:
            earlier = self.vectors(codes[:, :group]).to(hidden.dtype)
            state = state + F.linear(earlier, self.codes_to_groups.weight[rows, : earlier.shape[-1]])
        return F.gelu(state) @ self.to_codes[group]  # N B -> N C

    def group_nll(self, hidden: Tensor, arrays: dict[str, Tensor], smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood of each code of each position, in nats.  # N D -> N G"""
        states = self.group_states(hidden, arrays["codes"])  # N G B
        return grouped_cross_entropy(states, self.to_codes, arrays["codes"], smoothing)

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return self.group_nll(hidden, arrays).sum(-1)

    def training_loss(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        # The mean over groups gives a position the weight of a text token.
        return self.group_nll(hidden, arrays, SMOOTHING).mean(-1)
