"""Trains an encoder of `mini` to classify: `python -m tools.mini.encoder MODALITY --corpus DIR --out FILE`.

What the corpus says of a recording or an image are classes of one network, which the encoder is the body of. Each is
read in other ways each time: as by other voices, microphones and rooms, or at other places, scales and angles.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.codecs.conv_encoder import ConvEncoder
from openm6.codecs.registry import save_codec
from openm6.energy.meter import open_meter
from tools.mini.encoder_audio import LabelledAudio
from tools.mini.encoder_images import LabelledImages
from tools.mini.labelled import IGNORED, Examples, Heads

# Letters: B examples, D width, Q queries, K classes

BATCH, LEARNING_RATE, WEIGHT_DECAY, SMOOTHING, DROPOUT = 64, 3e-3, 0.05, 0.05, 0.2


class Classifier(nn.Module):
    """The encoder, and a linear layer for each head over its summaries."""

    def __init__(self, encoder: ConvEncoder, heads: Heads) -> None:
        super().__init__()
        self.encoder = encoder
        self.drop = nn.Dropout(DROPOUT)
        width = encoder.queries.out_channels * encoder.width
        self.heads = nn.ModuleDict({head: nn.Linear(width, len(names)) for head, names in heads.items()})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the scores of the classes of each head.  # B ... -> B K"""
        summaries = self.encoder.summaries(self.encoder.features(inputs))  # B D Q
        joined = self.drop(summaries.mT.flatten(1))  # B Q*D
        return {head: layer(joined) for head, layer in self.heads.items()}


def train(examples: Examples, epochs: float, seed: int = 0) -> Classifier:
    """Train a classifier with one cycle of the learning rate."""
    torch.manual_seed(seed)
    rng, network = torch.Generator().manual_seed(seed), Classifier(examples.encoder(), examples.heads)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = max(2, round(epochs * len(examples.parts) / BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    weights = torch.tensor([examples.WEIGHTS[part] for part in examples.parts])
    began = time.monotonic()
    for step in range(steps):
        rows = torch.multinomial(weights, BATCH, generator=rng)
        inputs, lost = examples.changed(rows, rng)
        with torch.autocast("cpu", torch.bfloat16):
            scores = network(inputs)
        loss = torch.stack(list(losses(scores, examples, rows, lost))).sum() / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:,} of {steps:,}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return network.eval()


def losses(
    scores: Mapping[str, Tensor], examples: Examples, rows: Tensor, lost: Mapping[str, Tensor]
) -> Iterable[Tensor]:
    """Return the loss of each head, summed over the examples that have a class of it."""
    for head, own in scores.items():
        expected = examples.classes[head][rows]
        if head in lost:
            expected = torch.where(lost[head], IGNORED, expected)
        yield F.cross_entropy(
            own.float(), expected, None, ignore_index=IGNORED, reduction="sum", label_smoothing=SMOOTHING
        )


@torch.inference_mode()
def accuracies(network: Classifier, examples: Examples) -> dict[str, float]:
    """Return the fraction of right classes of each head, of the examples that have one which was trained."""
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(examples.parts)).split(256):
        for head, scores in network(examples.inputs(rows)).items():
            expected = examples.classes[head][rows]
            found.setdefault(head, []).append((scores.argmax(1) == expected)[expected != IGNORED])
    joined = {head: torch.cat(right).float() for head, right in found.items()}
    return {head: round(right.mean().item(), 4) for head, right in joined.items() if len(right)}


def main(argv: Sequence[str] | None = None) -> None:
    kinds: dict[str, type[Examples]] = {"audio": LabelledAudio, "image": LabelledImages}
    parser = argparse.ArgumentParser(prog="python -m tools.mini.encoder", description=__doc__)
    parser.add_argument("modality", choices=kinds, help="what the encoder reads")
    parser.add_argument("--corpus", type=Path, default=Path("build/mini"), help="folder of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="file of the encoder, .safetensors")
    parser.add_argument("--epochs", type=float, default=10.0, help="passes over as many examples as there are")
    args = parser.parse_args(argv)
    kind = kinds[args.modality]
    examples = kind(args.corpus, "train")
    with open_meter() as meter, meter.span() as energy:
        began = time.monotonic()
        network = train(examples, args.epochs)
        seconds = time.monotonic() - began
    scores = {split: accuracies(network, kind(args.corpus, split, examples.heads)) for split in ("validation", "test")}
    save_codec(network.encoder, args.out)
    training = {"epochs": args.epochs, "examples": len(examples.parts), "minutes": round(seconds / 60, 1),
                "joules": round(energy.joules), "energy": energy.source}  # fmt: skip
    about = {"training": training, "accuracy": scores}
    args.out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
