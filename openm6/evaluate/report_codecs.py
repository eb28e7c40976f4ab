"""What is lost between raw pictures or sound and codes: a bound on how good an answer can look or sound."""

from __future__ import annotations

from openm6.evaluate.figures import score, words
from openm6.evaluate.report_markup import Markup, tag

MEASURES = {"psnr": "PSNR", "ssim": "SSIM", "log_mel_l1": "log-mel L1", "bits": "bits a place"}


def codecs(found: dict[str, dict[str, float]]) -> Markup | None:
    """A table for each codec: test records by row, measures by column; None where no codec is known."""
    if not found:
        return None
    lead = "Pictures and sounds are given as codes; their autoencoders bound how good an answer can look or sound."
    cards = [tag("div.codec", tag("h3", name), _table(by_record(scores))) for name, scores in found.items()]
    head = tag("h2", "Codecs", attributes={"id": "codecs"})
    return tag("section", head, tag("p.lead", lead), tag("div.codecs", *cards))


def by_record(scores: dict[str, float]) -> dict[str, dict[str, float]]:
    """Scores named `digits_32 psnr` and the like, by their records: `digits, 32 pixels` -> measure -> value."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        records, _, measure = key.rpartition(" ")
        name, _, size = records.rpartition("_")
        record = f"{words(name)}, {size} pixels" if name and size.isdigit() else words(records or "all")
        rows.setdefault(record, {})[measure] = value
    return rows


def _table(rows: dict[str, dict[str, float]]) -> Markup:
    measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    titles = [
        tag("th", MEASURES.get(measure, words(measure)), attributes={"scope": "col"}) for measure in measures
    ]
    lines = [
        tag(
            "tr",
            tag("th", record, attributes={"scope": "row"}),
            *[tag("td", score(measure, row[measure]) if measure in row else "") for measure in measures],
        )
        for record, row in rows.items()
    ]
    head = tag("thead", tag("tr", tag("td", tag("span.unseen", "records")), *titles))
    return tag("table.measures", head, tag("tbody", *lines))
