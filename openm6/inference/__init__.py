"""Inference: from a checkpoint and a prompt to text, images, audio and numbers."""

from openm6.codecs.external import ENCODERS, Encoder


def _trained_encoder(name: str, kind: str) -> Encoder:
    # It loads a model itself.
    from openm6.inference.encoder import TrainedEncoder  # noqa: PLC0415

    return TrainedEncoder(name, kind)


ENCODERS["openm6"] = _trained_encoder
