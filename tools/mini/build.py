"""Builds the corpus of the model `mini`: `python -m tools.mini.build --out DIR [--only PART] [--limit N]`."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path

from tools.mini import avatars, facts, images, music, names, speech, tables, texts
from tools.mini.corpus import Part, write_part
from tools.mini.packages import Packages, notice

PARTS: dict[str, Part] = {
    **images.PARTS, **avatars.PARTS, **speech.PARTS, **music.PARTS, **texts.PARTS, **names.PARTS, **facts.PARTS,
    **tables.PARTS,
}  # fmt: skip
SPLITS = ("train", "validation", "test")


def build(out: Path, packages: Packages, only: Iterable[str] = (), limit: int | None = None) -> dict[str, dict]:
    """Write the parts and `NOTICE`, and return for each part its counts, seconds and bytes."""
    out.mkdir(parents=True, exist_ok=True)
    report_file = out / "report.json"
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else {}
    for name in list(only) or PARTS:
        began = time.monotonic()
        file = out / f"{name}.parquet"
        counts = write_part(itertools.islice(PARTS[name].rows(packages), limit), file)
        if not PARTS[name].trains and set(counts) != {"test"}:
            raise ValueError(f"{name} is for tests only, but holds other records")
        report[name] = {split: counts[split] for split in SPLITS}
        report[name] |= {"seconds": round(time.monotonic() - began, 1), "bytes": file.stat().st_size}
        print(name, report[name], flush=True)
        report_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    built = [key for name in report for key in PARTS[name].packages]
    (out / "NOTICE").write_text(notice(built), encoding="utf-8")
    return report


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m tools.mini.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the Parquet files and NOTICE")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "openm6-mini", help="folder of packages")
    parser.add_argument("--only", action="append", default=[], choices=sorted(PARTS), help="a part; may be repeated")
    parser.add_argument("--limit", type=int, help="at most this many records of each part")
    arguments = parser.parse_args()
    packages = Packages(arguments.cache)
    packages.import_requirements()
    build(arguments.out, packages, arguments.only, arguments.limit)


if __name__ == "__main__":
    main()
