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
# # Training on chats with images
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/openm6/blob/main/examples/chat.ipynb)
#
# You have conversations about images, in the file that every fine-tuning tool reads: one JSON object per line, with
# `messages` and `images`. You want a model that answers in the same way, also to a second question.
#
# It needs `pip install .` in a checkout of OpenM6, and pandas; no GPU, and half a minute on one core. The conversations
# are made here, from the scanned digits of scikit-learn.

# %%
import json
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
from sklearn.datasets import load_digits

import openm6
from openm6.train.run import train_recipe

# %% [markdown]
# ## Data
#
# Each conversation shows an image and asks two questions. Only the turns of the assistant are learned.

# %%
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
digits = load_digits()
Path("chats").mkdir(exist_ok=True)
lines = []
for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    image = PIL.Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB")
    image.save(f"chats/{number}.png")
    messages = [
        {"role": "user", "content": "<image>Which digit is this?"},
        {"role": "assistant", "content": names[label]},
        {"role": "user", "content": "Is it even?"},
        {"role": "assistant", "content": "no" if label % 2 else "yes"},
    ]
    lines.append({"messages": messages, "images": [f"{number}.png"]})
train, test = lines[:1500], lines[1500:]
Path("chats/talk.jsonl").write_text("\n".join(map(json.dumps, train)))
print(json.dumps(train[0], indent=1))

# %% [markdown]
# ## Training

# %%
recipe = """
model:
  preset: nano
  overrides: {hidden_size: 96, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 32}
modalities:
  image: {max_patches: 16}
sources:
  talk: {kind: chat, path: chats/talk.jsonl}
mixture:
- {source: talk, task: chat}
packing: {batch_size: 2, seq_len: 256}
loop: {steps: 300, log_every: 100, tensorboard: false, num_processes: 1, optimizer: {learning_rate: 0.003}}
eval: {at_end: false}
"""
Path("chat.yaml").write_text(recipe)
result = train_recipe("chat.yaml", out=Path("runs/chat"))

# %% [markdown]
# ## A conversation
#
# `chat` takes messages in the form of OpenAI and transformers. The answer to the first question is part of the second.

# %%
m6 = openm6.load("runs/chat")
words = [{"type": "text", "text": "Which digit is this?"}]
shown = [{"type": "image", "path": f"chats/{number}.png"} for number in range(1500, 1600)]
firsts = [[{"role": "user", "content": [image, *words]}] for image in shown]
answers = m6.chat(firsts, max_new_tokens=8)
again = {"role": "user", "content": "Is it even?"}
seconds = [[*one, {"role": "assistant", "content": said}, again] for one, said in zip(firsts, answers, strict=True)]
found = pd.DataFrame({"scan": [names[one] for one in digits.target[1500:1600]], "Which digit is this?": answers})
found["Is it even?"] = m6.chat(seconds, max_new_tokens=8)
print(f"{(found['scan'] == found['Which digit is this?']).mean():.0%} of 100 new scans are named correctly")
found.head(8)

# %% [markdown]
# The scans of the table:

# %%
PIL.Image.fromarray(np.hstack([PIL.Image.open(f"chats/{n}.png").resize((96, 96)) for n in range(1500, 1508)]))
