"""From a user's data to packed batches. The steps of the data path, in order:

1. `sources` opens every source of a recipe by its `kind`; `source` defines a source and the split of its records.
2. `table` reads rows of a table (`text_tables`: CSV, JSON Lines; `parquet`: Parquet, embedded data, `datasets`;
   `media`: tars and folders of files; `windows`: time series), each found through `storage`.
3. `records` turns a row into a record: canonical keys, each with a checked value.
4. `mixture` decides which record comes next and which data shard it belongs to, from the seed alone.
5. `prepare` turns a record into an example by a task, and the example into segments of tokens by the modalities.
6. `modalities.batch` builds the integers of the sequence rule from segments: a packed example.
7. `packing` fills rows with packed examples and collates them to a batch with a cursor; `quarantine` counts the rest.

`inspect` and `propose` look at a user's data before a run and write a recipe for it.
"""
