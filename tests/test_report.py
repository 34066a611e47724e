"""The report of `tqc benchmark`: one file, complete, that asks for nothing from a network."""

from __future__ import annotations

import base64
import re

from tqc.evaluate.evaluation import DENSE, OURS, Evaluation, Row
from tqc.evaluate.report import html


def test_the_report_is_one_file_with_its_picture_in_it() -> None:
    rows = [
        Row(DENSE, DENSE, perplexity=9.5, bits_4096=16.0),
        Row("k3v3", OURS, kl_mean=0.008, kl_p99=0.1, bits_4096=3.57, perplexity=9.6, cache_bytes=12_345),
        Row("<b>", OURS, reason="no layer's cache was packed & so on"),
    ]
    page = html([Evaluation("A <model>", "float32", 512, 256, 0, rows)], {"machine": "2 cores"})
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert picture and base64.b64decode(picture[1]).startswith(b"\x89PNG")
    assert "A &lt;model&gt;" in page and "&lt;b&gt;" in page and "packed &amp; so on" in page and "<b>" not in page
    assert "<td>0.008</td>" in page and "<td>12,345</td>" in page and "machine: 2 cores" in page
    assert not re.search(r"https?:|<script|<link", page)
