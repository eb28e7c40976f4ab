"""Times of the series in a DataFrame: how they are read, their frequency, and those of the steps ahead."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np

from openm6.core.errors import DataError
from openm6.data.windows import parse_times
from openm6.modalities.dates import FORMS, parsed, plain_number, strptime


def read_times(pd: Any, cells: Any, time_format: str | None, beside: Sequence[Any] = ()) -> Any:
    """Times as they are compared: numbers as they are, all else as dates; texts are read as in the training.

    `beside`: more times, which show how texts are to be read.
    """
    texts = cells.tolist()
    try:
        if not texts or not all(isinstance(one, str) for one in texts):
            cells = cells.infer_objects()
            if pd.api.types.is_numeric_dtype(cells):
                return cells
            if any(isinstance(one, int | float) and not np.isnan(one) for one in texts):
                raise ValueError("numbers beside dates, which pandas would count as nanoseconds")
            return pd.to_datetime(cells)
        plain = [one.strip() for one in texts]
        fits = time_format is not None and parsed(plain, partial(strptime, time_format=time_format))
        if not fits and parsed(plain, FORMS["ISO"]):  # whatever form the training had
            with suppress(ValueError, TypeError):  # zones that differ
                return pd.to_datetime(cells, format="ISO8601")  # keeps the zone
            time_format, beside = None, ()
        more = [one for one in beside if isinstance(one, str)]
        times = parse_times([*texts, *more], cells.name, "df", time_format)[: len(texts)]
        if time_format is None and parsed(plain, plain_number):
            return pd.Series(times, cells.index)
        return pd.Series(pd.to_datetime(times, unit="s", utc=_has_zone(plain[0])), cells.index)
    except (ValueError, TypeError):
        raise DataError(f"df holds times that cannot be read in {cells.name!r}: write them as 2024-05-31") from None
    except DataError as error:
        reason = str(error).removeprefix("df: ").partition(": ")[0]
        raise DataError(f"df holds times that cannot be read ({reason}): write them as 2024-05-31") from None


def _has_zone(text: str) -> bool:
    """Whether an ISO time states its zone."""
    with suppress(ValueError):
        return datetime.fromisoformat(text).tzinfo is not None
    return False


def same_times(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two lists of as many times are equal; numbers, up to their rounding."""
    numbers = [isinstance(time, int | float | np.number) for time in (*one, *other)]
    if not any(numbers):
        return list(one) == list(other)
    return all(numbers) and bool(np.allclose(np.asarray(one, float), np.asarray(other, float), rtol=1e-9, atol=1e-9))


def frequency(pd: Any, times: list[Any]) -> str | float | None:
    """The frequency of sorted dates, the step of sorted numbers; None of fewer than three, and of irregular ones."""
    if len(times) < 3:
        return None
    return pd.infer_freq(pd.DatetimeIndex(times)) if isinstance(times[0], pd.Timestamp) else _step(times)


def _step(times: Sequence[Any]) -> float | None:
    """The step of sorted numbers, whole if it is; None if it varies by more than the rounding of a fraction."""
    steps = np.diff(np.asarray(times, float))
    if not len(steps) or not np.allclose(steps, steps[0], rtol=1e-4, atol=0):
        return None
    step = float(f"{steps.mean():.9g}")
    return int(step) if step.is_integer() else step


def times_ahead(
    pd: Any, times: list[Any], length: int, freq: str | None, shared: set[str | float | None], where: str
) -> tuple[list[Any], list[Any]]:
    """The times of a series and those of the steps ahead; DataError if they are missing, repeated or irregular.

    With `freq`, times without a row are among them.
    A series of one or two times has the frequency that all others share.
    """
    if any(pd.isna(one) for one in times):
        raise DataError(f"{where} has rows without a time: fill or drop them")
    repeated = next((first for first, second in itertools.pairwise(times) if first == second), None)
    if repeated is not None:
        raise DataError(f"{where} has the time {repeated} twice: keep one row per time")
    if isinstance(times[0], pd.Timestamp):
        found = freq or frequency(pd, times)
        if found is None and len(times) < 3 and len(shared) == 1:
            (found,) = shared
        if found is not None:
            try:
                every = pd.date_range(times[0], times[-1], freq=found)
                later = pd.date_range(times[-1], periods=length + 1, freq=found)
            except (ValueError, OverflowError) as error:
                raise DataError(f"freq={found!r} does not lead beyond {times[-1]} ({error}): name one, as D") from None
            if len(every) > len(times):
                if not set(times) <= set(every):
                    raise DataError(f"the times of {where} do not fit freq={found!r}: resample them")
                times = list(every)
            # The last time need not be one of the frequency.
            return times, list(later[later > times[-1]][:length])
    else:
        step = _step(times)
        numbers = [one for one in shared if isinstance(one, int | float)]
        if step is None and len(times) < 3 and len(numbers) == 1:
            step = numbers[0]
        if step is not None:
            return times, [times[-1] + number * step for number in range(1, length + 1)]
    raise DataError(f"the times of {where} have no regular frequency, or are too few: resample them, or name freq='D'")
