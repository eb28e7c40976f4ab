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
# # Energy: what a training costs
#
# How much electricity does a training take? You want an estimate before it starts, and an account by task when it has
# ended. Here a model
# learns from a medical table and from scanned digits, both of scikit-learn, while a meter runs.
#
# It needs `pip install .` in a checkout of OpenM6, and pandas; no GPU, and half a minute on one core.

# %%
from pathlib import Path

import pandas as pd
from sklearn.datasets import load_diabetes

from openm6.core.run_folder import RunFolder
from openm6.evaluate.results import read_account
from openm6.plan.hardware import ClusterOptions, gpu
from openm6.plan.plan import plan_json
from openm6.plan.request import PlanRequest, read_model
from openm6.train.run import train_recipe

# %% [markdown]
# ## Training with a meter
#
# Every run is metered. Where no counter can be read, as in most virtual machines, the energy of the processor is
# estimated from the time that its cores are busy; the account names the source.

# %%
load_diabetes(as_frame=True, scaled=False).frame.to_csv("diabetes.csv", index=False)
recipe = """
model:
  preset: nano
  overrides: {hidden_size: 96, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 32}
modalities:
  image: {max_patches: 16}
  numbers: {predictors: ridge}
sources:
  diabetes: {kind: csv, path: diabetes.csv, fields: {numbers: [age, bmi, bp, s1, s5, target], categories: [sex]}}
  digits: {kind: embedded, name: digits}
mixture:
- {source: diabetes, task: record_regression}
- {source: digits, task: image_classification}
packing: {batch_size: 2, seq_len: 256}
loop: {steps: 120, log_every: 10, tensorboard: false, num_processes: 1, energy: {country: FRA, pue: 1.0}}
eval: {at_end: false}
"""
Path("energy.yaml").write_text(recipe)
result = train_recipe("energy.yaml", out=Path("runs/energy"))

# %% [markdown]
# ## By task

# %%
run = RunFolder(Path("runs/energy"))
account = read_account(run)
print(f"{account.tracker.joules:.0f} J for {account.tracker.tokens:,} tokens (source: {account.tracker.source})")
tasks = pd.DataFrame(account.to_json()["tasks"]).T
tasks.round(3)

# %% [markdown]
# ## By country
#
# The same joules cause other emissions on other grids.

# %%
grids = [read_account(run, country) for country in ("SWE", "FRA", "DEU", "WLD", "IND")]
table = [(one.grid.name, one.grid.grams_per_kwh, one.grams(one.tracker.joules)) for one in grids]
pd.DataFrame(table, columns=["grid", "g CO2e per kWh", "g CO2e of this run"]).round(4)

# %% [markdown]
# ## Before a run
#
# `openm6 plan` estimates a large run at once, without a GPU: here 100 billion tokens of the preset `base`.

# %%
plans = {}
for kind, count in (("a100-80gb", 8), ("h100-80gb", 8), ("h100-80gb", 64)):
    plan, values = plan_json(PlanRequest(read_model("base"), tokens=1e11), gpu(kind), ClusterOptions(count, 8))
    energy = values["energy"]
    plans[f"{count} × {kind}"] = {"days": plan.days, "MWh": energy["mwh"], "kg CO2e": energy["kg_co2e"]}
pd.DataFrame(plans).T.round(2)
