from __future__ import annotations

import gzip
import json
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from openm6.core.config import build
from openm6.core.errors import DataError
from openm6.data.inspect import Inspection, inspect_path
from openm6.data.mixture import Component, MixtureSampler
from openm6.data.packing import Packer, PackingConfig
from openm6.data.prepare import ExampleTransform
from openm6.data.quarantine import Quarantine
from openm6.data.sources import open_sources
from openm6.train.recipe import MultimodalRecipe
from tests.data.sample_images import png, wav
from tests.small_model import modalities


def recipe_of(inspection: Inspection) -> MultimodalRecipe:
    """The proposed recipe, which must be one that training accepts and whose sources open."""
    assert inspection.recipe is not None
    recipe = build(MultimodalRecipe, yaml.safe_load(inspection.recipe), "proposal")
    open_sources(recipe.sources, "train")
    return recipe


def tasks_of(inspection: Inspection, name: str) -> list[str]:
    return next(found.tasks for found in inspection.datasets if found.name == name)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A shop's table with an image that is broken, one that is missing, a wrong cell and a wrong line."""
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(png() if number != 5 else b"\x89PNG broken")
    (tmp_path / "6.png").unlink()
    lines = ["photo,title,price,rating,category,seller"]
    for number in range(40):
        price = "cheap" if number == 7 else "NaN" if number == 8 else str(number)
        lines.append(f"{number}.png,a fine thing no {number},{price},{number % 5},{'ab'[number % 2]}-ware,Jö")
    lines.append("1.png,too,many,cells,in,this,line")
    (tmp_path / "shop.csv").write_bytes("\n".join(lines).encode() + b"\n2.png,\xff\xfe,1,1,a-ware,Jo\n")
    return tmp_path / "shop.csv"


def test_a_shop_with_troubles(shop):
    inspection = inspect_path(str(shop))
    (found,) = inspection.datasets
    assert (found.name, found.kind, found.rows) == ("shop", "csv", 42)
    assert {column.name: column.kind for column in found.columns} == {
        "photo": "image",
        "title": "free text",
        "price": "number",
        "rating": "category",
        "category": "category",
        "seller": "category",
    }
    assert found.source["fields"] == {
        "image": "photo",
        "text_en": "title",
        "label": "category",
        "numbers": ["price"],
        "categories": ["rating", "category", "seller"],
    }
    assert found.unused == []
    assert (found.unreadable, found.broken) == (1, 4)
    reasons = " | ".join(found.problems)
    for wanted in ("7 cells where the header has 6", "no file '6.png'", "shop/5: the image", "'cheap'", "not UTF-8"):
        assert wanted in reasons
    assert {
        "image_categorization",
        "image_captioning",
        "text_to_image",
        "record_classification",
        "record_regression",
    } <= set(found.tasks)
    assert recipe_of(inspection).sources["shop"].kind == "csv"
    json.dumps(asdict(inspection))


def test_a_recipe_for_captions_of_which_a_third_is_missing_can_be_packed(tmp_path):
    """What is proposed must not stop on the way: a record without a caption is not broken."""
    (tmp_path / "a.png").write_bytes(png())
    rows = [f"a.png,{'' if n % 3 == 0 else f'a thing that has the number {n}'}" for n in range(90)]
    (tmp_path / "x.csv").write_text("photo,caption\n" + "\n".join(rows) + "\n")
    inspection = inspect_path(str(tmp_path / "x.csv"))
    assert "image_captioning" in tasks_of(inspection, "x") and not inspection.datasets[0].broken
    recipe = recipe_of(inspection)
    sources = open_sources(recipe.sources, "train")
    parts = [Component(source=sources[part.source], task=part.task) for part in recipe.mixture]
    quarantine = Quarantine(limit=recipe.max_broken, minimum=50)
    packer = Packer(
        ExampleTransform(MixtureSampler(parts, 0), modalities(), 0, {}), PackingConfig(batch_size=1), quarantine
    )
    while quarantine.seen < 60:
        next(packer.batches())
    assert quarantine.counts["not_applicable"]["x/image_captioning"] > 5 and not quarantine.counts["broken"]


def test_a_folder_of_tables_with_test_parts(tmp_path):
    for part, count in (("train", 30), ("test", 10)):
        rows = {"text_en": [f"words {n} of the {part} part" for n in range(count)], "label": ["x", "y"] * (count // 2)}
        pq.write_table(pa.table(rows), tmp_path / f"notes-{part}.parquet")
    inspection = inspect_path(str(tmp_path))
    (found,) = inspection.datasets
    assert (found.name, found.train, found.test, found.source["kind"]) == ("notes", 30, 10, "parquet")
    assert "fields" not in found.source  # the columns have canonical names already
    assert found.tasks == ["text_classification"]
    recipe_of(inspection)


@pytest.mark.parametrize(("parts", "held_out"), [(("train", "validation"), 10), (("train", "val", "test"), 8)])
def test_a_validation_table_is_never_trained_on(tmp_path, parts, held_out):
    for part, count in (("train", 30), ("validation", 10), ("val", 10), ("test", 8)):
        if part in parts:
            rows = [f"words {n} of {part},{'xy'[n % 2]}" for n in range(count)]
            (tmp_path / f"{part}.csv").write_text("\n".join(["text_en,label", *rows]))
    (found,) = inspect_path(str(tmp_path)).datasets
    assert (found.train, found.test) == (30, held_out)


def test_a_folder_of_images(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for number in range(10):
            (tmp_path / kind / f"{number}.png").write_bytes(png())
    (tmp_path / "dog" / "bad.png").write_bytes(b"no image")
    inspection = inspect_path(str(tmp_path))
    (found,) = inspection.datasets
    assert (found.kind, found.rows, found.broken) == ("folder", 21, 1)
    assert found.tasks == ["image_categorization"]
    assert [column.summary for column in found.columns] == ["cat (10), dog (10)"]
    recipe_of(inspection)


@pytest.mark.parametrize(
    ("colour", "labels", "flips"),
    [
        ("red", ("cat", "dog"), True),
        ("grey", ("cat", "dog"), None),
        ("red", ("turn right", "turn left"), None),
        ("red", ("motorcycle left", "rocket"), True),
        ("red", ("letter b", "letter d"), None),
    ],
)
def test_how_images_are_read_follows_from_their_colours_and_labels(tmp_path, colour, labels, flips):
    # More of the first label than are opened.
    for label, count in zip(labels, (80, 10), strict=True):
        (tmp_path / label).mkdir()
        for number in range(count):
            (tmp_path / label / f"{number}.png").write_bytes(png(colour))
    recipe = yaml.safe_load(inspect_path(str(tmp_path)).usable_recipe())
    image = recipe["modalities"]["image"]
    assert image.get("flips") == flips
    assert image["stem"] == "conv" and image["patch"] == 16


def test_audio_clips_and_their_words(tmp_path):
    rows = [{"clip": f"{number}.wav", "sentence": f"word number {number} is said"} for number in range(12)]
    for row in rows:
        (tmp_path / row["clip"]).write_bytes(wav())
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inspection = inspect_path(str(tmp_path / "said.jsonl"))
    assert tasks_of(inspection, "said") == ["speech_recognition", "text_to_speech"]
    recipe_of(inspection)


def test_a_series(tmp_path):
    days = [f"20{10 + n // 336}-{1 + n // 28 % 12:02d}-{1 + n % 28:02d},{n % 7},{n}" for n in range(400)]
    malformed = "2010-01-01,1,2,3\n" * 2
    (tmp_path / "w.csv").write_text("date,rain,wind\n" + "\n".join(days) + "\n" + malformed)
    inspection = inspect_path(str(tmp_path / "w.csv"))
    assert tasks_of(inspection, "w_series") == ["time_series_forecasting"]
    assert recipe_of(inspection).sources["w_series"].columns == ["rain", "wind"]


def test_a_series_of_months(tmp_path):
    """One number column alone: no task but a forecast suits it."""
    rows = [f"{1949 + n // 12}-{1 + n % 12:02d},{100 + n}" for n in range(144)]
    (tmp_path / "air.csv").write_text("Month,Passengers\n" + "\n".join(rows) + "\n")
    inspection = inspect_path(str(tmp_path / "air.csv"))
    assert tasks_of(inspection, "air") == [] and tasks_of(inspection, "air_series") == ["time_series_forecasting"]
    source = recipe_of(inspection).sources["air_series"]
    assert (source.columns, source.time, source.context, source.horizon) == (["Passengers"], "Month", 32, 8)


def test_a_series_counted_by_a_number(tmp_path):
    (tmp_path / "x.csv").write_text("t,load\n" + "".join(f"{n},{n % 7}\n" for n in range(200)))
    source = recipe_of(inspect_path(str(tmp_path / "x.csv"))).sources["x_series"]
    assert (source.columns, source.time, source.context, source.horizon) == (["load"], "t", 32, 7)


def test_the_season_of_a_long_series_is_found_in_a_part_of_it(tmp_path):
    (tmp_path / "x.csv").write_text("t,load\n" + "".join(f"{n},{n % 12}\n" for n in range(20_000)))
    began = time.process_time()
    source = recipe_of(inspect_path(str(tmp_path / "x.csv"))).sources["x_series"]
    assert (source.context, source.horizon) == (64, 12)
    assert (source.test_fraction, source.validation_fraction) == (0.1, 0.1)
    assert time.process_time() - began < 20, "not by all lags of all windows of half the length"


def test_several_series_in_one_table_are_told_apart(tmp_path):
    rows = [f"{'abc'[n % 3]},2024-{1 + n // 84:02d}-{1 + n // 3 % 28:02d},{n}" for n in range(300)]
    (tmp_path / "x.csv").write_text("store,date,sales\n" + "\n".join(rows) + "\n" + "a,2024-01-01,1,2\n" * 2)
    inspection = inspect_path(str(tmp_path / "x.csv"))
    source = recipe_of(inspection).sources["x_series"]
    assert (source.columns, source.time, source.group, source.horizon) == (["sales"], "date", "store", 8)
    assert inspection.datasets[0].unused == []


def test_an_identifier_before_the_column_of_series_hides_none(tmp_path):
    rows = [f"{n},{'abc'[n % 3]},2024-{1 + n // 84:02d}-{1 + n // 3 % 28:02d},{n}.5" for n in range(300)]
    (tmp_path / "x.csv").write_text("id,store,date,sales\n" + "\n".join(rows) + "\n")
    source = recipe_of(inspect_path(str(tmp_path / "x.csv"))).sources["x_series"]
    assert (source.columns, source.group) == (["sales"], "store")


def test_dates_of_which_some_rows_share_one_are_no_series(tmp_path):
    rows = [f"2024-01-{1 + n % 28:02d},{n}" for n in range(300)]
    (tmp_path / "x.csv").write_text("date,sales\n" + "\n".join(rows) + "\n")
    assert [found.kind for found in inspect_path(str(tmp_path / "x.csv")).datasets] == ["csv"]


def test_dates_of_two_readings_ask_for_a_format(tmp_path):
    rows = [f"{1 + n % 12:02d}/{1 + n // 12:02d}/2024,{n}" for n in range(120)]
    (tmp_path / "x.csv").write_text("day,load\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match='two ways.* time_format: "%m/%d/%Y"'):
        inspect_path(str(tmp_path / "x.csv")).usable_recipe()


def test_dates_of_a_table_are_inputs(tmp_path):
    rows = [
        f"{1 + n % 28:02d}.{1 + n % 12:02d}.2023,2023-06-{1 + n % 30:02d},{1 + n % 9:02d}/05/2024,{n % 50},{n * 7 % 31}"
        for n in range(300)
    ]
    (tmp_path / "x.csv").write_text("ordered_at,sent,paid,weight,price\n" + "\n".join(rows) + "\n")
    inspection = inspect_path(str(tmp_path / "x.csv"))
    (found,) = inspection.datasets
    recipe = recipe_of(inspection)
    assert recipe.sources["x"].fields.dates == {"ordered_at": "%d.%m.%Y", "sent": None}
    assert "sent month" in open_sources(recipe.sources, "train")["x"][0]["numbers"]
    assert found.unused == ["paid"] and found.broken == 0
    assert found.columns[2].summary.endswith("; format %m/%d/%Y or %d/%m/%Y?")
    assert found.tasks == ["record_regression"]


def test_a_series_has_no_task_that_predicts_it_from_dates_alone(tmp_path):
    rows = [f"{1950 + n // 12}-{1 + n % 12:02d},{n}" for n in range(144)]
    (tmp_path / "x.csv").write_text("month,load\n" + "\n".join(rows) + "\n")
    inspection = inspect_path(str(tmp_path / "x.csv"))
    assert [one.tasks for one in inspection.datasets] == [[], ["time_series_forecasting"]]


def test_a_text_that_tells_its_label_is_no_task(tmp_path):
    rows = [f"the {kind} ware number {n},{kind}" for n in range(30) for kind in ("red", "blue")]
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    assert "text_classification" not in tasks_of(inspect_path(str(tmp_path / "t.csv")), "t")


def sizes(folder: Path, rows: int, split: str = "") -> str:
    """A table of two columns; with a third that marks some rows by `split`, and others as test, if it is given."""
    lines = [f"{n * n % 1009 / 7:.3f},{n * n % 97 / 7:.3f}" for n in range(rows)]
    if split:
        words = [split, *["train"] * 7, "test"]
        lines = [f"{line},{words[number % 9]}" for number, line in enumerate(lines)]
    (folder / "x.csv").write_text("length,width" + ",split" * bool(split) + "\n" + "\n".join(lines) + "\n")
    return str(folder / "x.csv")


def test_a_run_that_repeats_few_records_often_ends_early(tmp_path):
    few = inspect_path(sizes(tmp_path, 300))
    recipe = recipe_of(few)
    assert recipe.loop.early_stopping_patience and recipe.loop.load_best_model_at_end and recipe.loop.minutes == 10
    opened = {split: len(open_sources(recipe.sources, split)["x"]) for split in ("train", "validation", "test")}
    assert 10 < opened["validation"] < opened["train"] and sum(opened.values()) == 300
    short = recipe_of(inspect_path(sizes(tmp_path, 300), minutes=0.5)).loop
    assert (short.minutes, short.held_out, short.early_stopping_patience) == (0.5, None, None)
    assert recipe_of(inspect_path(sizes(tmp_path, 6000))).loop.held_out is None


def test_validation_records_of_the_data_are_used(tmp_path):
    recipe = recipe_of(inspect_path(sizes(tmp_path, 6000, "validation")))
    assert recipe.loop.load_best_model_at_end and recipe.sources["x"].validation_fraction == 0
    assert recipe_of(inspect_path(sizes(tmp_path, 6000, "test"))).loop.held_out is None


@pytest.mark.parametrize("content", ["", "no table at all", "\n\n"])
def test_a_file_without_anything_usable(tmp_path, content):
    (tmp_path / "x.csv").write_text(content)
    inspection = inspect_path(str(tmp_path / "x.csv"))
    assert inspection.recipe is None and inspection.datasets[0].problems


def test_nothing_there(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="nothing at|holds no tables"):
            inspect_path(str(path))


def reviews(*numbers: int) -> bytes:
    rows = [{"text": f"a long review number {n} about {n % 7}", "mood": ("bad", "good")[n % 2]} for n in numbers]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data-train.jsonl", "data-test.jsonl"),
        ("data-train.jsonl.gz", "data-test.jsonl.gz"),
        ("Train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl"),
    ],
)
def test_files_of_test_rows_are_never_trained_on(train: str, test: str, tmp_path: Path) -> None:
    for name, rows in ((train, range(60)), (test, range(60, 80))):
        (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(reviews(*rows)))
    recipe = recipe_of(inspect_path(str(tmp_path)))
    assert [one.test_path for one in recipe.sources.values()] == [str(tmp_path / test)]
    assert list(recipe.sources) == ["data"]


def test_test_rows_in_several_parts_are_read_as_one_table(tmp_path: Path) -> None:
    rows = {"text_en": [f"words {n}" for n in range(40)], "label": ["x", "y"] * 20}
    for name in ("train-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002", "other-test"):
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    (found,) = inspect_path(str(tmp_path)).datasets
    assert (found.train, found.test) == (40, 80) and found.source["test_path"].endswith("test-*-of-00002.parquet")
    (problem,) = found.problems
    assert (
        "other-test.parquet: it is not used: a training table has one table of test rows, whose name has test"
        in problem
    )


def test_parts_of_a_training_table_are_one_source_and_a_second_held_out_table_is_named(tmp_path: Path) -> None:
    rows = {"text_en": [f"words {n}" for n in range(40)], "label": ["x", "y"] * 20}
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    (found,) = inspect_path(str(tmp_path)).datasets
    assert (found.name, found.train + found.validation, found.test) == ("data", 80, 40)
    assert ["validation-00000-of-00001.parquet: it is not used" in one for one in found.problems] == [True]


def test_a_label_that_is_asked_for_is_all_that_is_learned(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text_en,label\n" + "".join(f"words {n},{'ab'[n % 2]}\n" for n in range(60)))
    recipe = recipe_of(inspect_path(str(tmp_path / "x.csv"), target="label"))
    assert [component.task for component in recipe.mixture] == ["text_classification"]


def test_a_test_table_without_what_is_predicted_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b,price\n" + "".join(f"{n},{n}.5,{2 * n}.25\n" for n in range(60)))
    (tmp_path / "test.csv").write_text("a,b\n" + "".join(f"{n},{n}.5\n" for n in range(9)))
    (found,) = inspect_path(str(tmp_path)).datasets
    assert "test_path" not in found.source and 0 < found.test < 20 and found.tasks == ["record_regression"]
    assert "test.csv has no column 'price'" in found.problems[0]


def test_chats_in_other_tables_are_to_be_exported(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 9
    pq.write_table(pa.table({"messages": chats}), tmp_path / "x.parquet")
    (found,) = inspect_path(str(tmp_path)).datasets
    assert found.kind == "parquet" and "export them as .jsonl" in found.problems[0]
    (tmp_path / "y.csv").write_text("name,messages\n" + "".join(f"n{n},some {n} words\n" for n in range(9)))
    (found,) = inspect_path(str(tmp_path / "y.csv")).datasets
    assert (found.kind, found.broken) == ("csv", 0)


def test_an_open_decimal_mark_is_proposed_and_named(tmp_path: Path) -> None:
    rows = [f"2024-{1 + n // 28:02d}-{1 + n % 28:02d};1,{200 + n};{n % 9},{n % 10}" for n in range(60)]
    lines = [row if n % 3 else row[:-2] + row[-2:].replace(",", ".") for n, row in enumerate(rows)]
    (tmp_path / "x.csv").write_text("day;reviews;price\n" + "\n".join(lines) + "\n")
    found, series = inspect_path(str(tmp_path)).datasets
    assert "can be read in two ways" in found.problems[0] and found.problems[0].endswith("of most cells, ','")
    assert found.source["decimal"] == series.source["decimal"] == "," and found.tasks and series.tasks


def test_cells_that_are_sometimes_lists_are_compared(tmp_path: Path) -> None:
    kinds = [[n] if n == 7 else "ab"[n % 2] for n in range(99)]
    rows = [{"day": f"2024-01-{1 + n // 2 % 28:02d}", "kind": kind, "v": n / 7} for n, kind in enumerate(kinds)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inspect_path(str(tmp_path)).datasets[0].rows == 99


def test_broken_images_are_counted_over_the_whole_folder(tmp_path: Path) -> None:
    content = png()
    for number in range(400):
        (tmp_path / f"{number:03d}.png").write_bytes(content if number < 300 else b"\x89PNG broken")
    (found,) = inspect_path(str(tmp_path)).datasets
    assert 0.22 < found.broken_fraction < 0.28


def test_each_file_is_a_source_of_its_own(tmp_path: Path) -> None:
    for name in ("reviews.2023.jsonl", "reviews.2024.jsonl"):
        (tmp_path / name).write_bytes(reviews(*range(60)))
    recipe = recipe_of(inspect_path(str(tmp_path)))
    paths = {name: Path(one.path).name for name, one in recipe.sources.items()}
    assert paths == {"reviews": "reviews.2023.jsonl", "reviews_2": "reviews.2024.jsonl"}
    assert {part.source for part in recipe.mixture} == set(paths)


def test_odd_cells_are_summed_up_too(tmp_path: Path) -> None:
    rows = [{"tags": 5 if n == 7 else ["a", "b"], "v": 1e30, "t": f"words {n}"} for n in range(40)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = {column.name: column.summary for column in inspect_path(str(tmp_path)).datasets[0].columns}
    assert "2 to 2 items" in shown["tags"] and "mean 1e+30" in shown["v"]
