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
# # A shop: prices from photos and titles
#
# You run a shop. You have the prices of the goods that you sell, and you want prices for new ones, from a photo, a
# title and a rating. You also want an interval for each price.
#
# It needs `pip install .` in a checkout of OpenM6, and pandas; no GPU, and half a minute on one core. The goods are
# synthetic and come with the package; put your own table in their place.

# %%
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image

import openm6


# %%
def goods(split: str, count: int) -> pd.DataFrame:
    """Return a table of goods, with a path to a photo in each row."""
    embedded = Path(openm6.__file__).parent / "data" / "embedded"
    rows = pd.read_parquet(embedded / f"shop-{split}.parquet").head(count)
    Path("photos").mkdir(exist_ok=True)
    paths = [f"photos/{split}-{number}.png" for number in range(len(rows))]
    for path, content in zip(paths, rows["image"], strict=True):
        Path(path).write_bytes(content)
    pairs = zip(rows["num_names"], rows["num_values"], strict=True)
    numbers = pd.DataFrame([dict(zip(*pair, strict=True)) for pair in pairs])
    return numbers.assign(photo=paths, title=rows["text_en"].to_numpy())


shop, new = goods("train", 400), goods("test", 60)
shop.head()

# %% [markdown]
# ## Training
#
# The estimator follows scikit-learn. Columns of paths, texts and numbers are recognised by what they hold.

# %%
columns = ["photo", "title", "rating"]
small = {
    "preset": "nano",
    "overrides": {"hidden_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
}
regressor = openm6.OpenM6Regressor(max_steps=200, model=small, random_state=0).fit(shop[columns], shop["price"])

# %% [markdown]
# ## Prices of new goods
#
# The interval from `low` to `high` should hold eight of ten true prices.

# %%
quantiles = regressor.predict(new[columns], output_type="quantiles", quantile_levels=[0.1, 0.5, 0.9])
found = new[["title", "price"]].assign(low=quantiles[:, 0], proposed=quantiles[:, 1], high=quantiles[:, 2]).round(1)
error = (found["proposed"] - found["price"]).abs().mean()
guess = (shop["price"].median() - new["price"]).abs().mean()
inside = ((found["low"] <= found["price"]) & (found["price"] <= found["high"])).mean()
print(f"mean error {error:.1f}, of the median price {guess:.1f}; {inside:.0%} of the true prices are in the interval")
found.head(8)

# %% [markdown]
# The photos of these goods:

# %%
PIL.Image.fromarray(np.hstack([PIL.Image.open(path).convert("RGB").resize((96, 96)) for path in new["photo"][:8]]))

# %% [markdown]
# A run of several minutes (`openm6 data inspect shop.csv`, then `openm6 train`) also writes titles, sorts goods into
# categories and draws photos.
