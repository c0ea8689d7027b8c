"""docs/comparison.md's figures come from the files that benchmarks keep, and tell what is missing."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import comparison

    return comparison


def side(seconds, megabytes):
    return {"seconds": [seconds] * 3, "peak_bytes": megabytes * 1e6}


def test_tables_are_made_of_what_was_measured(comparison, tmp_path, monkeypatch):
    shape = dict(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=2, inner=8, vocabulary=10, tied=True)
    served = {
        "tokens_per_second": {"base": 40.0, "singles": 30.0, "peft": 20.0}, "rank": 8, "threads": 2, "turns": 7,
        "attach_ms": 12.345, "adapter": "out/x",
    }  # fmt: skip
    (tmp_path / "performance").mkdir()
    chat = {"machine": "a machine", "found": {"full": side(4.0, 4000), "head": side(0.05, 1000), "odd": side(1, 1)}}
    (tmp_path / "performance" / "chat.json").write_text(json.dumps(chat))
    (tmp_path / "performance" / "rates.json").write_text(json.dumps({"machine": "m", "found": {"shape": shape}}))
    (tmp_path / "serve.json").write_text(json.dumps(served))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("x" * 1_000_000)
    doc = tmp_path / "page.md"
    doc.write_text("a <!-- measured --> old <!-- /measured --> z")
    command = ["comparison.py", "--kept", tmp_path, "--adapter", tmp_path / "adapter", "--doc", doc]
    monkeypatch.setattr("sys.argv", [*map(str, command)])
    comparison.main()
    text = doc.read_text()
    assert text.startswith("a ") and text.endswith(" z") and "old" not in text and "odd" not in text
    assert "| unlearn_peft, LoRA on `lm_head` | 0.05 | 80 times as fast | 1000 | 25 % |" in text
    assert "| unlearn_peft, an adapter a row | 30.0 | 75 % |" in text
    assert "| attach from disk, verified | 12.3 |" in text
    assert "1.00 MB" in text and "0.10 GB" in text
    assert text.count(comparison.MISSING) == 1  # running text


def test_nothing_measured_is_told(comparison):
    text = comparison.section({"rates": None, "chat": None, "text": None}, None, None)
    assert text.count(comparison.MISSING) == 4
