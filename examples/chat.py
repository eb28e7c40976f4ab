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
# # Fine-tuning with chats about images
#
# You have a model, and conversations about images in the file that every fine-tuning tool reads: one JSON object per
# line, with `messages` and `images`. You want the model to converse, and to keep its old task.
#
# It needs `pip install .` in a checkout of OpenM6, and pandas; no GPU, and a minute on one core. Model and
# conversations are made here, from the scanned digits of scikit-learn.

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
# ## A model to start from
#
# It names the digit of a scan, and was not trained on conversations. Any run, checkpoint or model of the Hub would do.

# %%
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
digits = load_digits()
Path("scans").mkdir(exist_ok=True)
for number, pixels in enumerate(digits.images):
    image = PIL.Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB")
    image.save(f"scans/{number}.png")
known = pd.DataFrame({"image": [f"{n}.png" for n in range(1500)], "label": [names[n] for n in digits.target[:1500]]})
known.to_csv("scans/known.csv", index=False)
recipe = """
model:
  preset: nano
  overrides: {hidden_size: 96, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 32}
modalities:
  image: {max_patches: 16}
sources:
  known: {kind: csv, path: scans/known.csv}
mixture:
- {source: known, task: image_classification}
packing: {batch_size: 2, seq_len: 256}
loop: {steps: 200, log_every: 100, tensorboard: false, num_processes: 1, optimizer: {learning_rate: 0.003}}
eval: {at_end: false}
"""
Path("start.yaml").write_text(recipe)
train_recipe("start.yaml", out=Path("runs/start"))
start = openm6.load("runs/start")

# %% [markdown]
# ## Conversations
#
# Each shows an image and asks two questions. Only the turns of the assistant are learned.

# %%
lines = []
for number, label in enumerate(digits.target[:1500]):
    messages = [
        {"role": "user", "content": "<image>Which digit is this?"},
        {"role": "assistant", "content": names[label]},
        {"role": "user", "content": "Is it even?"},
        {"role": "assistant", "content": "no" if label % 2 else "yes"},
    ]
    lines.append({"messages": messages, "images": [f"{number}.png"]})
Path("scans/talk.jsonl").write_text("\n".join(map(json.dumps, lines)))
print(json.dumps(lines[0], indent=1))

# %% [markdown]
# ## Fine-tuning
#
# One example of ten is from the tasks of the start (`replay`), so that they are not forgotten.

# %%
tuned = openm6.finetune("runs/start", data="scans/talk.jsonl", steps=200, replay=0.1)

# %% [markdown]
# ## A conversation
#
# `chat` takes messages in the form of OpenAI and transformers. The answer to the first question is part of the second.

# %%
words = [{"type": "text", "text": "Which digit is this?"}]
shown = [{"type": "image", "path": f"scans/{number}.png"} for number in range(1500, 1600)]
firsts = [[{"role": "user", "content": [image, *words]}] for image in shown]
answers = tuned.chat(firsts, max_new_tokens=8)
again = {"role": "user", "content": "Is it even?"}
seconds = [[*one, {"role": "assistant", "content": said}, again] for one, said in zip(firsts, answers, strict=True)]
found = pd.DataFrame({"scan": [names[one] for one in digits.target[1500:1600]], "Which digit is this?": answers})
found["Is it even?"] = tuned.chat(seconds, max_new_tokens=8)
print(f"{(found['scan'] == found['Which digit is this?']).mean():.0%} of 100 new scans are named correctly in a chat")
found.head(8)

# %% [markdown]
# The scans of the table:

# %%
PIL.Image.fromarray(np.hstack([PIL.Image.open(f"scans/{n}.png").resize((96, 96)) for n in range(1500, 1508)]))

# %% [markdown]
# ## What is left of the old task
#
# The same scans, named without a chat, before and after.

# %%
scans = [f"scans/{number}.png" for number in range(1500, 1600)]
for name, model in (("before", start), ("after", tuned)):
    right = np.mean([said == true for said, true in zip(model.generate(image=scans), found["scan"], strict=True)])
    print(f"{name}: {right:.0%}")
