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
# # Audio: a model that recognises spoken words
#
# You want a device to react to spoken commands. You have some recordings of each word, by several voices, and no
# pretrained model. Here the words are the ten digits; the recordings come with the package.
#
# It needs `pip install .` in a checkout of OpenM6, and pandas; no GPU, and half a minute on one core.

# %%
import io
from pathlib import Path

import pandas as pd
import soundfile

import openm6
from openm6.train.run import train_recipe

# %%
embedded = Path(openm6.__file__).parent / "data" / "embedded"
test = pd.read_parquet(embedded / "espeak_digits-test.parquet")
test = test[test["extra"].str.contains('"spoken_language": "en"')].reset_index(drop=True)
clip = openm6.Audio(*soundfile.read(io.BytesIO(test["audio"][0])))
clip

# %% [markdown]
# ## Training

# %%
recipe = """
model:
  preset: nano
  overrides: {hidden_size: 96, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 32}
sources:
  spoken: {kind: embedded, name: espeak_digits}
mixture:
- {source: spoken, task: speech_recognition}
packing: {batch_size: 2, seq_len: 256}
loop: {steps: 300, log_every: 100, tensorboard: false, num_processes: 1, optimizer: {learning_rate: 0.003}}
eval: {at_end: false}
"""
Path("speech.yaml").write_text(recipe)
result = train_recipe("speech.yaml", out=Path("runs/speech"))

# %% [markdown]
# ## Recognition
#
# The voice of the test recordings is no part of the training. (The data hold Chinese recordings, too, which the model
# learns to answer in Chinese; here only the English ones are asked about.)

# %%
m6 = openm6.load("runs/speech")
answers = m6.generate(audio=list(test["audio"]), max_new_tokens=8)
found = pd.DataFrame({"spoken": test["label"].to_numpy(), "answer": answers})
correct = (found["spoken"] == found["answer"]).mean()
print(f"{correct:.0%} of {len(found)} recordings are recognised (at random: 10 %)")
found.groupby("spoken")["answer"].agg(", ".join).to_frame()

# %% [markdown]
# ## Likelihoods
#
# A device should ask again rather than guess. `rank` returns the likelihood of each command.

# %%
words = sorted(test["label"].unique())
ranked = m6.rank("What is said?", words, audio=clip)
pd.DataFrame([(one.candidate, one.score) for one in ranked], columns=["word", "score"]).head(3)

# %% [markdown]
# The task `text_to_speech` in the mixture, and some minutes more, make the same model speak; see `openm6 demo`.
