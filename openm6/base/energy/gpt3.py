"""The yardstick: what training GPT-3 took, as others worked it out."""

from __future__ import annotations

MWH = 1287.0  # arXiv 2104.10350: 10,000 V100 × 14.8 days × 330 W × PUE 1.10
TOKENS = 300e9
JOULES_A_TOKEN = MWH * 3.6e9 / TOKENS  # 15.4

CAVEAT = (
    "GPT-3 took 15.4 J a token (1,287 MWh for 300B tokens, worked out from rated hardware, arXiv 2104.10350). "
    "The ratio says how much energy one token of training took here and there. It does not say that the models are "
    "alike: energy a token grows with the parameters that work on it and falls with newer hardware, and a small model "
    "is not made equal to a large one by being cheap."
)
