"""`openm6 evaluate`: which lessons, on whose records, with what scores."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from openm6.cli.main import app
from openm6.core.errors import CheckpointError, ConfigError, DataError
from openm6.data.media import FolderConfig
from openm6.data.parquet import EmbeddedConfig
from openm6.data.records import Fields
from openm6.data.sources import open_sources
from openm6.data.text_tables import CsvConfig
from openm6.data.windows import WindowsConfig
from openm6.evaluate.run import evaluate, open_own_data, source_configs
from openm6.tasks.slots import PINNED
from openm6.train.run import train_recipe
from tests.data.sample_images import png
from tests.train.tiny_recipe import tiny_recipe, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_recipe(write_recipe(folder, tiny_recipe(2, save_every=2)), out=folder / "run")
    return folder / "run"


def table(folder: Path, name: str = "mine.csv") -> Path:
    """A few penguins of one's own, one of them without a mass."""
    path = folder / name
    rows = [
        {"id": f"p{n}", "label": "Adelie", "text_en": f"penguin {n}", "numbers": {"bill_length_mm": 40 + n,
         "body_mass_g": None if n == 2 else 3000 + 100 * n}} for n in range(6)
    ]  # fmt: skip
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [
            f'{r["id"]},{r["label"]},{r["text_en"]},"{json.dumps(r["numbers"]).replace(chr(34), chr(34) * 2)}"'
            for r in rows
        ]
        path.write_text("id,label,text_en,numbers\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_only_the_tasks_named(run: Path) -> None:
    assert [r.name for r in evaluate(run, ["text_to_image", "speech_recognition/spoken"]).results] == [
        "text_to_image/digits",
        "speech_recognition/spoken",
    ]


def test_layer_by_layer_the_scores_are_the_same(run: Path) -> None:
    """The matrices of a model that does not fit stay in its files."""
    names, settings = ["tabular_regression"], ["eval.records=4", "eval.answers=2"]
    whole, offloaded = (evaluate(run, names, settings=settings, num_gpu_layers=layers) for layers in (None, 0))
    assert [result.to_json() for result in offloaded.results] == [result.to_json() for result in whole.results] != []


def test_a_task_that_was_not_learned_gets_a_hint(run: Path) -> None:
    with pytest.raises(ConfigError, match="was not trained on task 'text_to_imag'; did you mean 'text_to_image'"):
        evaluate(run, ["text_to_imag"])


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.csv"])
def test_records_of_ones_own(run: Path, tmp_path: Path, name: str) -> None:
    found = evaluate(run, ["tabular_regression"], data=table(tmp_path, name))
    assert [(result.name, result.records) for result in found.results] == [("tabular_regression/penguins", 4)]


def test_tasks_that_find_nothing_in_them_are_left_out(run: Path, tmp_path: Path) -> None:
    found = evaluate(run, data=table(tmp_path, "mine.jsonl"))
    assert [result.task for result in found.results] == ["tabular_regression"]


def test_records_that_suit_no_task_are_an_error(run: Path, tmp_path: Path) -> None:
    """An empty table of scores would look like success."""
    with pytest.raises(
        DataError,
        match=r"no record of --data .*mine.jsonl can be evaluated in text_to_image: name its columns",
    ):
        evaluate(run, ["text_to_image"], data=table(tmp_path, "mine.jsonl"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere.csv", "there is nothing at .*nowhere.csv: check the path"),
        ("notes.txt", "notes.txt is no table but a text"),
        ("folder.csv", "no images or audio clips below"),
    ],
)
def test_records_that_cannot_be_read(run: Path, tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=sentence):
        evaluate(run, data=tmp_path / name)


def test_only_the_rows_marked_as_test_are_judged(run: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "mine.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({**row, "split": "test" if n > 3 else "train"}) + "\n"
                            for n, row in enumerate(rows)), encoding="utf-8")  # fmt: skip
    (result,) = evaluate(run, ["tabular_regression"], data=path).results
    assert result.records == 2 and {sample.record_id for sample in result.samples} <= {"p4", "p5"}


def test_settings_can_be_changed(run: Path) -> None:
    found = evaluate(run, ["image_classification"], settings=["eval.records=12", "eval.answers=7"])
    assert found.results[0].answered == 7
    with pytest.raises(ConfigError, match="unknown key 'record'"):
        evaluate(run, settings=["eval.record=3"])
    with pytest.raises(ConfigError, match="settings of the section eval only"):
        evaluate(run, settings=["loop.steps=3"])


def test_from_the_command_line(run: Path, tmp_path: Path) -> None:
    scores = tmp_path / "s.json"
    shown = CliRunner().invoke(
        app,
        env={"COLUMNS": "160"},
        args=["evaluate", str(run), "--tasks", "text_to_image", "--json", str(scores)],
    )
    assert shown.exit_code == 0, shown.output
    assert "text_to_image/digits" in shown.stdout and "information" in shown.stdout
    assert list(json.loads(scores.read_text(encoding="utf-8"))["tasks"]) == ["text_to_image/digits"]


def test_scores_that_could_not_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--json", str(tmp_path / "no/s.json")])
    assert shown.exit_code == 1 and "--json" in shown.stderr and "make it first" in shown.stderr


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run or checkpoint at"):
        evaluate(tmp_path / "nowhere")


def test_a_checkpoint_without_its_description(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run / "checkpoints" / "step-2", tmp_path / "step-2")
    state = json.loads((copy / "state.json").read_text(encoding="utf-8"))
    del state["files"]["model.json"]
    (copy / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (copy / "model.json").unlink()
    with pytest.raises(CheckpointError, match="has no model.json: it is not a checkpoint of a multimodal model"):
        evaluate(copy)


def test_a_source_of_an_unknown_kind_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="recipe: sources.a: no kind is called 'excel'; ") as caught:
        source_configs({"a": {"kind": "excel", "path": "x"}}, "recipe")
    assert "\n" not in str(caught.value)


def test_a_mistyped_key_of_a_source_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="unknown key 'sources.a.csv.seperator'; did you mean 'separator'"):
        source_configs({"a": {"kind": "csv", "path": "x", "seperator": ";"}}, "recipe")


SHOP = CsvConfig(path="shop.csv", fields=Fields(text_en="title", label="kind", numbers=["price"]))
ROWS = [{"title": f"cup {n}", "kind": "ab"[n % 2], "price": n} for n in range(12)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in the format of the ending."""
    names = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for number, row in enumerate(rows):
                content = json.dumps(row).encode()
                member = tarfile.TarInfo(f"{number}.json")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        mark = {".tsv": "\t", ".csv": ";"}[path.suffix]
        lines = [names, *([str(row[name]) for name in names] for row in rows)]
        path.write_text("".join(mark.join(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "tar"])
def test_every_format_is_read_through_the_mapping_of_the_training(tmp_path: Path, ending: str) -> None:
    source = open_own_data(write_rows(tmp_path / f"mine.{ending}", ROWS), {"shop": SHOP})["shop"]
    assert len(source) == 12 and source.name == "shop"
    assert source[3] | {"id": ""} == {"id": "", "text_en": "cup 3", "label": "b", "numbers": {"price": 3.0}}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_test_rows_alone_where_a_column_says_so(tmp_path: Path, ending: str) -> None:
    marked = [{**row, "split": "train" if n % 3 else "test"} for n, row in enumerate(ROWS)]
    source = open_own_data(write_rows(tmp_path / f"mine.{ending}", marked), {"shop": SHOP})["shop"]
    assert source.values("text_en") == ["cup 0", "cup 3", "cup 6", "cup 9"]
    alone = [row for row in marked if row["split"] == "test"]
    assert len(open_own_data(write_rows(tmp_path / f"test.{ending}", alone), {"shop": SHOP})["shop"]) == 4


def test_training_rows_alone_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.csv", [{**row, "split": "train"} for row in ROWS])
    with pytest.raises(DataError, match="column 'split' of .*mine.csv marks no row as test"):
        open_own_data(path, {"shop": SHOP})


def test_settings_of_the_trained_source_are_kept(tmp_path: Path) -> None:
    trained = SHOP.model_copy(update={"columns": ["title", "kind", "price"], "limit": 3, "test_path": "gone.csv"})
    path = tmp_path / "mine.csv"
    path.write_text("".join(f"{row['title']},{row['kind']},{row['price']}\n" for row in ROWS))
    assert len(open_own_data(str(path), {"shop": trained})["shop"]) == 12


def test_the_target_and_columns_of_own_tasks_are_those_of_the_training_in_every_format(tmp_path: Path) -> None:
    update = {"target": "price", "task_fields": Fields(extra=["note"]), "test_by": "buyer"}
    noted = [{**row, "note": f"note {row['price']}"} for row in ROWS]
    canonical = [{"text_en": row["title"], "note": row["note"]} for row in noted]
    for name, rows in (("mine.parquet", noted), ("mine.csv", noted), ("canonical.jsonl", canonical)):
        source = open_own_data(write_rows(tmp_path / name, rows), {"shop": SHOP.model_copy(update=update)})["shop"]
        assert source[3]["text_en"] == "cup 3" and len(source) == 12
        assert source[3]["extra"] == {"note": "note 3", PINNED: "price"}


def test_a_table_need_not_have_the_split_column_of_the_training(tmp_path: Path) -> None:
    trained = SHOP.model_copy(update={"split": "part"})
    for column, count in (("none", 12), ("split", 4), ("part", 4)):
        marked = [{**row, column: "train" if n % 3 else "test"} for n, row in enumerate(ROWS)]
        for ending in ("csv", "parquet"):
            path = write_rows(tmp_path / f"{column}.{ending}", marked)
            assert len(open_own_data(path, {"shop": trained})["shop"]) == count
    missing = trained.model_copy(update={"path": str(tmp_path / "none.csv")})
    with pytest.raises(DataError, match="has no column 'part'"):
        open_sources({"shop": missing}, "train")


def test_canonical_names_do_where_the_mapping_does_not_fit(tmp_path: Path) -> None:
    rows = [{"text_en": row["title"], "label": row["kind"]} for row in ROWS]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    for trained in (SHOP, EmbeddedConfig(name="emoji")):
        assert open_own_data(path, {"shop": trained})["shop"][0]["text_en"] == "cup 0"


def test_columns_that_fit_nothing_name_the_nearest(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.csv", [{"titel": "a", "kind": "b", "price": 1}])
    with pytest.raises(
        DataError, match=r"--data .* no source of this model: .* no column 'title'; did you mean 'titel'"
    ):
        open_own_data(path, {"shop": SHOP})


def test_a_folder(tmp_path: Path) -> None:
    for part, kind in (("train", "cat"), ("test", "cat"), ("test", "dog")):
        (tmp_path / part / kind).mkdir(parents=True)
        (tmp_path / part / kind / "1.png").write_bytes(png())
    trained = {"pets": FolderConfig(path="elsewhere", labels=False), "shop": SHOP}
    sources = open_own_data(str(tmp_path), trained)
    assert sources["pets"].values("id") == ["test/cat/1.png", "test/dog/1.png"]
    assert "label" not in sources["pets"][0] and sources["shop"][0]["label"] == "cat"
    assert len(open_own_data(str(tmp_path / "train"), trained)["pets"]) == 1


def test_windows_and_what_has_no_such_columns(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    path.write_text("day,load\n" + "".join(f"{n},{n}\n" for n in range(20)))
    trained = {
        "load": WindowsConfig(path="x", columns=["load"], time="day", context=4, horizon=2),
        "shop": SHOP,
    }
    sources = open_own_data(str(path), trained)
    assert list(sources) == ["load"] and len(sources["load"]) == 15
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png())
    with pytest.raises(DataError, match="load takes windows of a table, not a folder"):
        open_own_data(str(tmp_path / "images"), {"load": trained["load"]})
