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
# # Quick start: one model that draws and reads
#
# You train a small model on scanned digits, which come with the package. Some examples show an image and ask for its
# name, the others show a name and ask for an image. Afterwards the same weights do both.
#
# It needs `pip install .` in a checkout of OpenM6, and pandas; no GPU, and half a minute on one core.

# %%
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image

import openm6
from openm6.train.run import train_recipe

# %% [markdown]
# A recipe names the data, the tasks and the length of the training. On the command line the next cell is
# `openm6 train quickstart.yaml`.

# %%
recipe = """
model:
  preset: nano
  overrides: {hidden_size: 96, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 32}
modalities:
  image: {codec: image-64, side: 32, max_patches: 16}
sources:
  digits: {kind: embedded, name: digits}
mixture:
- {source: digits, task: image_classification}
- {source: digits, task: text_to_image, weight: 1.5}
packing: {batch_size: 2, seq_len: 256}
loop: {steps: 400, log_every: 100, tensorboard: false, num_processes: 1, optimizer: {learning_rate: 0.003}}
eval: {at_end: false}
"""
Path("quickstart.yaml").write_text(recipe)
result = train_recipe("quickstart.yaml", out=Path("runs/quickstart"))

# %% [markdown]
# ## An image from a text

# %%
m6 = openm6.load("runs/quickstart")
words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
prompts = [f"draw the digit {word}" for word in words]
images = m6.generate(prompts, output="image", num_inference_steps=8, temperature=0.4)
PIL.Image.fromarray(np.hstack(images)).resize((960, 96))

# %% [markdown]
# ## A text from an image
#
# The scans below are test records, which the training has not seen.

# %%
embedded = Path(openm6.__file__).parent / "data" / "embedded"
test = pd.read_parquet(embedded / "digits-test.parquet").head(100)
answers = m6.generate(image=list(test["image"]), max_new_tokens=8)
found = pd.DataFrame({"scan": test["label"].to_numpy(), "answer": answers})
print(f"{(found['scan'] == found['answer']).mean():.0%} of 100 scans are read correctly (at random: 10 %)")
found.head(10)

# %% [markdown]
# Longer training makes both better. `openm6 demo` trains images, audio, text and numbers together in seven minutes.
