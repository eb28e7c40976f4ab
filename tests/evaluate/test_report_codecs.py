"""Scores of the codecs: records by row, measures by column, units beside them."""

from __future__ import annotations

import re

from openm6.evaluate.report_codecs import by_record, codecs
from openm6.modalities.codec import codec_scores


def test_scores_are_laid_out_by_their_records() -> None:
    scores = {"digits_32 psnr": 31.3, "digits_32 bits": 35.2, "digits log_mel_l1": 0.58, "psnr": 20.0}
    assert by_record(scores) == {
        "digits, 32 pixels": {"psnr": 31.3, "bits": 35.2},
        "digits": {"log_mel_l1": 0.58},
        "all": {"psnr": 20.0},
    }


def test_the_shipped_codecs_have_a_table_each() -> None:
    page = codecs({name: codec_scores(name) for name in ("image-64", "sound")})
    assert page is not None and page.count("<table") == 2
    assert "digits, 64 pixels" in page and "log-mel L1" in page
    cells = re.findall(r"<td>([^<]*)</td>", page)
    assert sum("dB" in cell for cell in cells) == 6 and all(cells)


def test_a_measure_that_one_record_lacks_is_an_empty_cell() -> None:
    page = codecs({"x": {"a psnr": 30.0, "b ssim": 0.9}})
    assert page is not None and page.count("<td></td>") == 2
    assert codecs({}) is None
