"""What others wrote steers no terminal, and looks like nothing but what it is."""

import io
import json
import logging

import torch
from safetensors.torch import save_file

from unlearn_peft.errors import PolicyError, printable
from unlearn_peft.evaluate.compare import show
from unlearn_peft.serve.policy.store import PolicyStore

# two lines up, over what stands there, and a title for the window; C1's form of it; text turned round
EVIL = "\x1b[2A\r\x1b[2Ksignature: by alice\n\x1b]0;title\x07\x9b2A\x7f\u202egnp.exe"
STEERING = {chr(n) for n in (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))} - {
    "\n",
    "\t",
}


def assert_plain(text):
    assert not STEERING & set(text), {hex(ord(character)) for character in STEERING & set(text)}


def test_what_is_shown_instead():
    assert printable("a\x1b[31m\tb\nc\r") == "a\\u001b[31m\tb\nc\\u000d"
    assert printable("a\nb", lines=False) == "a\\u000ab"
    assert_plain(printable(EVIL))
    for text in ("Größe 大 🧠 👩‍🔬 می‌خواهم", "a\tb"):
        assert printable(text, lines=False) == text
    assert json.loads(printable(json.dumps({"x": EVIL}, ensure_ascii=False))) == {"x": EVIL}, "still JSON, and equal"


def test_inspect(run, tmp_path):
    adapter = tmp_path / "hp"
    adapter.mkdir()
    factors = {f"base_model.model.x.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    manifest = {"schema_version": 1, "base": {"name": "x"}, "metrics": {EVIL: 2.1}, "recipe": {"x": {EVIL: EVIL}}}
    (adapter / "forget.json").write_text(json.dumps(manifest))
    code, shown, err = run("inspect", adapter)
    assert code == 0, err
    assert_plain(shown)
    assert sum(line.startswith("signature: ") for line in shown.splitlines()) == 1, "one field is one line"
    code, shown, _ = run("inspect", adapter, "--json")
    assert json.loads(shown)["metrics"] == {EVIL: 2.1}
    assert_plain(shown)


def test_answers_and_errors(run, monkeypatch):
    from unlearn_peft.cli import options
    from unlearn_peft.inference import attach, generate

    monkeypatch.setattr(options, "load", lambda *_: None)
    monkeypatch.setattr(attach, "attach", lambda *_, **__: [])
    monkeypatch.setattr(generate, "answers", lambda *_, **__: [EVIL])
    for more in ((), ("--json",)):
        code, shown, err = run("generate", "--prompt", "Who?", *more)
        assert code == 0 and "alice" in shown, err
        assert_plain(shown)

    def fails(*_, **__):
        raise PolicyError(EVIL)

    monkeypatch.setattr(generate, "answers", fails)
    code, _, err = run("generate", "--prompt", "Who?")
    assert code == 2 and "error: " in err
    assert_plain(err)


def test_a_comparison(capsys):
    show({"probes": [{"prompt": EVIL, **{state: {"text": EVIL, "leaked": ["alice"]} for state in
         ("before", "with", "after")}}], "leaks": {"before": 1, "with": 1, "after": 1}})  # fmt: skip
    assert_plain(capsys.readouterr().out)


def test_a_history_that_another_program_wrote(run, tmp_path):
    store = PolicyStore(tmp_path / "tenants.db", create=True)
    with store._engine.begin() as connection:
        row = (1, "2026", EVIL, "add", "{}", EVIL)
        connection.exec_driver_sql("INSERT INTO unlearn_history VALUES (?, ?, ?, ?, ?, ?)", row)
    store.close()
    code, shown, _ = run("tenant", "history", "--store", tmp_path / "tenants.db")
    assert code == 0 and len(shown.splitlines()) == 1
    assert_plain(shown)


def test_no_log_line_is_forged(run, monkeypatch):
    """What a message quotes is a part of its entry, never an entry of its own."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    run("tenant", "--help")
    logging.getLogger("unlearn_peft").warning("refused: %s", f"x\nPolicy 3-ab: 5 tenants{EVIL}")
    assert_plain(stream.getvalue())
    first, *others = stream.getvalue().splitlines()
    assert first == "refused: x" and others and all(line.startswith("  ") for line in others)
