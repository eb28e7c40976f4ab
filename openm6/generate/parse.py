"""What a person types about numbers, as values: shares of a side, columns, a series."""

from __future__ import annotations

import math

from openm6.base.errors import ConfigError
from openm6.modalities.numbers import NumberSeries


def parse_shares(words: str | None, count: int, name: str) -> tuple[float, ...] | None:
    """`0.25,0.25,0.75,0.75` as numbers.

    Raises:
        ConfigError: not `count` numbers.
    """
    if words is None:
        return None
    try:
        shares = tuple(float(word) for word in words.split(","))
    except ValueError:
        shares = ()
    if len(shares) != count:
        raise ConfigError(f"{name} {words!r} must be {count} numbers between 0 and 1, with commas between")
    return shares


def parse_numbers(words: str | None) -> dict[str, float | None] | None:
    """`mass=3.5,length=` as a mapping; nothing after the equals sign means missing.

    Raises:
        ConfigError: a part without a name, or with a value that is not a finite number.
    """
    if words is None:
        return None
    numbers: dict[str, float | None] = {}
    for part in words.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise ConfigError(f"--numbers has {part!r}, which must look like name=3.5")
        try:
            numbers[name] = _number(value)
        except ValueError:
            raise ConfigError(
                f"--numbers has {part!r}, which must look like name=3.5, a finite number, or name= where it is missing"
            ) from None
    return numbers


def parse_series(words: str | None) -> NumberSeries | None:
    """`temp_max=12.8,10.6,,11.1` as a series; nothing between commas means missing.

    Raises:
        ConfigError: no name, or a value that is not a finite number.
    """
    if words is None:
        return None
    name, equals, values = words.partition("=")
    numbers: list[float | None] = []
    for step, value in enumerate(values.split(","), 1):
        try:
            numbers.append(_number(value.strip()))
        except ValueError:
            raise ConfigError(
                f"--series has {value!r} as value {step}, which must be a finite number, or nothing where it is missing"
            ) from None
    if not equals or not name.strip():
        raise ConfigError(f"--series {words!r} must look like temp_max=12.8,10.6,11.7")
    return NumberSeries(name.strip(), numbers)


def _number(value: str) -> float | None:
    """None for nothing; raises ValueError for anything but a finite number."""
    if not value:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number
