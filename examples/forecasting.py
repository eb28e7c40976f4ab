# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Forecasting with intervals
#
# You plan ahead by a daily number: temperatures, sales, visitors. One number per day is not enough: you also want
# an interval for it. Here it is the highest temperature of each day in Seattle, four years of which come with the
# package.
#
# It needs `pip install .` in a checkout of OpenM6, and pandas; no GPU, and half a minute on one core.

# %%
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import PIL.ImageDraw

import openm6
from openm6.train.run import train_recipe

# %%
embedded = Path(openm6.__file__).parent / "data" / "embedded"
weather = pd.read_parquet(embedded / "seattle_weather_daily.parquet")[["date", "temp_max"]]
weather.to_csv("weather.csv", index=False)
weather.tail(3)

# %% [markdown]
# ## Training
#
# The model learns from windows of the first 80 % of the days.

# %%
recipe = """
model:
  preset: nano
  overrides: {hidden_size: 96, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 32}
sources:
  weather: {kind: windows, path: weather.csv, time: date, columns: [temp_max], context: 48, horizon: 8}
mixture:
- {source: weather, task: time_series_forecasting}
packing: {batch_size: 2, seq_len: 256}
loop: {steps: 300, log_every: 100, tensorboard: false, num_processes: 1, optimizer: {learning_rate: 0.003}}
eval: {at_end: false}
"""
Path("forecasting.yaml").write_text(recipe)
result = train_recipe("forecasting.yaml", out=Path("runs/forecasting"))

# %% [markdown]
# ## Forecasts
#
# `forecast` has the arguments of Chronos' `predict_df`. Each item is a window of 48 days; the windows end on different
# days of the last year, which is no part of the training.

# %%
m6 = openm6.load("runs/forecasting")
weather["timestamp"] = pd.to_datetime(weather["date"])
ends = range(len(weather) - 250, len(weather) - 8, 24)
past = pd.concat([weather.iloc[end - 48 : end].assign(item_id=f"until {weather['date'][end - 1]}") for end in ends])
found = m6.forecast(past, target="temp_max", prediction_length=8, quantile_levels=[0.1, 0.5, 0.9])
found = found.merge(weather[["timestamp", "temp_max"]], on="timestamp")
inside = found["temp_max"].between(found["0.1"], found["0.9"]).mean()
last = past.groupby("item_id", sort=False)["temp_max"].last()
error = (found["predictions"] - found["temp_max"]).abs().mean()
naive = (found["item_id"].map(last) - found["temp_max"]).abs().mean()
print(f"mean error {error:.1f} degrees, of the last day repeated {naive:.1f}; {inside:.0%} of the days in the interval")
pd.options.display.precision = 1
found.head(8)

# %% [markdown]
# The last window: the past, the interval of 80 % with the median, and what came (white).

# %%
item = found[found["item_id"] == found["item_id"].iloc[-1]]
shown = past[past["item_id"] == item["item_id"].iloc[0]]["temp_max"].tail(24).to_numpy()
every = np.concatenate([shown, item["0.1"], item["0.9"], item["temp_max"]])


def points(values: np.ndarray, first: int) -> list[tuple[float, float]]:
    """Return pixels of values, of which the first is that many days from the left."""
    height = 190 - 180 * (np.asarray(values) - every.min()) / np.ptp(every)
    return [(20.0 * (first + day), float(y)) for day, y in enumerate(height)]


chart = PIL.Image.new("RGB", (640, 200), "black")
draw = PIL.ImageDraw.Draw(chart)
draw.polygon(points(item["0.1"], 24) + points(item["0.9"], 24)[::-1], fill="#30506a")
draw.line(points(item["0.5"], 24), fill="#4aa3df", width=3)
draw.line(points(np.concatenate([shown, item["temp_max"]]), 0), fill="white", width=2)
chart
