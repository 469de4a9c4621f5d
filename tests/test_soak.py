"""Twenty seconds of the soak: the same load and the same verdict as `make soak` gives after hours."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from soak import plot, soak
from watchdog import patience


@pytest.mark.slow
def test_twenty_seconds_of_everything(tmp_path):
    patience(300)
    report = soak(20.0, 12, seed=7)
    print(json.dumps({name: value for name, value in report.items() if name != "samples"}, indent=1))
    assert report["ok"], report["verdict"]
    assert report["requests"] > 50 and report["lives"] > 12 and report["kills"] > 0
    done = report["done"]
    assert done["checked"] > 0 and done["quantize"] > 0
    plot(report, tmp_path / "soak.svg")
    assert len(ET.parse(tmp_path / "soak.svg").findall(".//{*}polyline")) == 6
