"""The page's markup: nothing from outside, nothing that a name could start."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from lgvit_fast.data.batches import BadImage
from lgvit_fast.evaluation import Recording
from lgvit_fast.evaluation.report import LeftOut, Way, page, verdicts
from tests.evaluation.report.samples import make, row, rows

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "$style &amp; ${name} %s",
    "caf\udce9\x1b[31m\u202egnp.exe",
]


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("name", HOSTILE, ids=["script", "img", "attribute", "template", "bytes"])
def test_names_are_words_and_nothing_else(name):
    plain = Reader(page(make()))
    report = make(names=(name,) * 5, file=f"a folder/{name}", name=name, data=name, notes=(name,))
    text = page(report)
    text.encode()  # lone surrogates would raise
    found = Reader(text)
    assert found.tags.count("script") == 1 and found.tags.count("style") == 1
    assert found.tags.count("img") == plain.tags.count("img") == 12
    assert not [a for a in found.attributes if a[1].startswith("on")]
    assert "alert" not in "".join(re.findall(r"<script>(.*?)</script>", text, re.DOTALL))
    assert "\x1b" not in text and "\u202e" not in text


def test_rivals_and_reasons_are_escaped():
    name = HOSTILE[0]
    some = (*rows(), row(rival=name, ms={1: 1.0, 32: 1.0}))
    left_out = (LeftOut(Way("eager", rival=name), name),)
    text = page(make(rows=some, verdicts=tuple(verdicts(some)), left_out=left_out))
    assert Reader(text).tags.count("script") == 1
    assert "&lt;/script&gt;" in text


def test_nothing_comes_from_outside():
    found = Reader(page(make()))
    assert not {"link", "iframe", "object", "form", "base"} & set(found.tags)
    addresses = [value for _, name, value in found.attributes if name in ("src", "href", "action")]
    assert addresses and all(re.match("data:image/(png|jpeg);base64,", a) for a in addresses)


def test_the_policy_allows_the_pages_own_script_and_style_only():
    text = page(make())
    (policy,) = (v for _, n, v in Reader(text).attributes if v and "default-src" in v)
    for kind in ("script", "style"):
        (content,) = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    # the policy would block it
    assert not [a for a in Reader(text).attributes if a[1] == "style"]


def test_what_a_decision_needs_is_there():
    report = make()
    words = " ".join(" ".join(Reader(page(report)).words).split())
    for verdict in report.verdicts:
        assert verdict.headline in words
    assert "loses at most 1 points of accuracy" in words  # the certificate
    assert "images leave where the calibration images left" in words
    assert "instruction sets avx2" in words
    assert "full model on OpenVINO, float32: not installed" in words
    for part in ("photo.png", "ant", "block 2, lph_full", "final classifier", "89.6 %"):
        assert part in words
    without = " ".join(Reader(page(make(certificate=None))).words)
    assert "no certificate goes with" in without


def test_unreadable_files_are_listed():
    kept = make().recording
    bad = [BadImage("<b>torn</b>.jpg", "truncated")]
    text = page(make(recording=Recording(kept.logits, kept.targets, kept.layers, bad)))
    assert "1 files could not be read" in text and "&lt;b&gt;torn" in text


def test_ways_left_out_for_one_reason_share_a_line():
    ways = [Way("openvino"), Way("openvino", early=True), Way("compiled")]
    reasons = ["not installed", "not installed", "no compiler"]
    text = page(make(left_out=tuple(map(LeftOut, ways, reasons))))
    shared = "full model on OpenVINO, float32; early exit on OpenVINO, float32: not installed"
    assert f"<li>{shared}</li><li>full model on compiled PyTorch, float32: no compiler</li>" in text
