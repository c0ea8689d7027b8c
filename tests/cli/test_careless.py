"""Hurried command lines: each is understood, or refused with one error, exit code 2 and nothing written."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FORGET, RETAIN

from unlearn_peft import cli

COMMAND = [sys.executable, "-m", "unlearn_peft.cli"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command inside this process, in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("UNLEARN_PEFT_TRACEBACK", "1")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["unlearn-peft", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out = capsys.readouterr()
        return done.value.code or 0, out.out, out.err

    return call


@pytest.fixture
def refused(run):
    def call(*arguments, told):
        code, _, err = run(*arguments)
        errors = [line for line in err.splitlines() if line.lower().startswith("error: ")]
        assert code == 2 and len(errors) == 1 and told in err, (code, err)
        return err

    return call


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"forget": "forget.jsonl", "retain": "retain.jsonl", "steps": 1, "own_answers": 0, "anchor_batch": 0}
    (tmp_path / "r.yaml").write_text(json.dumps({"base": str(tiny_folder), **values}))
    return tmp_path / "r.yaml"


def test_strengths_are_finite_and_one_each(refused, tiny, make_adapter, tiny_folder):
    a, b = make_adapter(tiny, "a"), make_adapter(tiny, "b", seed=1)
    base = ("--base", tiny_folder)
    for strength in ("nan", "inf", "-inf", "1e300"):
        for words in (("generate", "--prompt", "x", "--adapter", a), ("merge", a, "--output", "m"), ("compare", a)):
            refused(*words, *base, "--strength", strength, told="'strength': ")
    for words in (
        ("generate", "--prompt", "x", "--adapter", a, "--adapter", b), ("merge", a, b, "--output", "m"),
        ("compare", a, b, "--prompt", "x"), ("eval", a, b, "--probes", "p.jsonl"), ("stack", a, b, "--output", "m"),
        ("export", a, b, "--output", "m"),
    ):  # fmt: skip
        Path("p.jsonl").write_text('{"prompt": "x", "leak": ["y"]}')
        told = "1 strength for 2 adapters: expected one each"
        refused(*words, *(base if words[0] != "stack" else ()), "--strength", "0.5", told=told)
    refused("generate", "--prompt", "x", *base, "--strength", "0.5", told="1 strength for 0 adapters")
    assert not Path("m").exists()


@pytest.mark.parametrize("name", ["attach", "swap", "rows"])
def test_strengths_in_python(tiny, make_adapter, name):
    from unlearn_peft import attach
    from unlearn_peft.errors import AdapterError
    from unlearn_peft.inference.attach import swap
    from unlearn_peft.inference.bank import Bank

    adapter = make_adapter(tiny, "a")
    bank = Bank.of(tiny)
    if name == "swap":
        attach(tiny, adapter)
    else:
        bank.register("b", adapter)
    before = dict(bank.adapters)
    with pytest.raises(AdapterError, match="a strength is nan"):
        if name == "attach":
            attach(tiny, adapter, strength=float("nan"))
        elif name == "swap":
            swap(tiny, "a", adapter, strength=float("nan"))
        else:
            bank.hold({"b": float("nan")})
    assert bank.adapters == before


def test_text_and_numbers_that_nothing_can_hold(refused, tmp_path):
    err = refused("generate", "--prompt", "Zorblax \udcff", told="'prompt': it is no text in UTF-8")
    assert "Zorblax" not in err
    refused("inspect", "\udcff", told="'adapter': it is no text")
    refused("generate", "--prompt", "x", "--seed", "1" * 30, told="'seed': ")
    refused("generate", "--prompt", "x", "--temperature", "nan", told="emperature")
    refused("serve", "--adapter", "x", "--max-seconds", "inf", told="'max_seconds': ")
    refused("pull", "x", "--max-size", "1e300", told="'max_size': ")
    refused("tenant", "forget", "a", "b=nan", told="")
    refused("train", "x.yaml", "--cache-gb", "nan", told="'cache_gb': ")
    assert not list(tmp_path.iterdir())


def test_home_is_expanded_in_every_option(run, refused, recipe, tmp_path):
    (tmp_path / "home").mkdir()
    recipe.rename(tmp_path / "home" / "r.yaml")
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "home" / f"{name}.jsonl")
    code, _, err = run("train", "~/r.yaml", "--set", "forget=~/forget.jsonl", "--output", "~/b", "--quiet")
    assert code == 0 and (tmp_path / "home" / "b" / "adapter_config.json").is_file(), err
    assert run("inspect", "~/b", "--json")[0] == 0
    assert run("tenant", "adapter", "b", "~/b", "--store", "~/t.db")[0] == 0
    assert run("push", "~/b", "~/b.tar.gz")[0] == 0 and run("pull", "~/b.tar.gz", "--output", "~/c")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    refused("inspect", "~no_such_user/x", told="no adapter at ~no_such_user/x")
    refused("generate", "--base", "~no_such_user/x", "--prompt", "x", told="no base model at")
    refused("sign", "~/b", "--key", "~no_such_user/x.pem", told="~no_such_user/x.pem")


def test_places_that_nothing_can_be_written_to(refused, recipe, tiny, tiny_folder, make_adapter, tmp_path):
    adapter = make_adapter(tiny, "adapter")
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for place in (".", "/", "..", "", "empty/.."):
        refused("train", recipe, "--quiet", "--output", place, told="")
        refused("stack", adapter, adapter, "--output", place, told="")
    for place in ("file", "/proc/x", "loop/x", "x" * 300):
        refused("train", recipe, "--quiet", "--output", place, told="")
        refused("stack", adapter, adapter, "--output", place, told="")
        refused("merge", adapter, "--base", tiny_folder, "--output", place, told="")
        refused("shrink", adapter, "--rank", "1", "--output", place, told="")
        refused("push", adapter, f"{place}/y.tar.gz", told="")
        refused("keys", "new", f"{place}/y", told="")
    assert sorted(tmp_path.rglob("*")) == before
    assert "another run" not in refused("train", recipe, "--quiet", "--output", "/proc/x", told="cannot write /proc/x")


def test_a_base_named_by_a_relative_path_is_found_from_anywhere(
    run, refused, recipe, tiny_folder, tmp_path, monkeypatch
):
    os.symlink(tiny_folder, tmp_path / "base")
    for n, base in enumerate(("base", "./base")):
        code, _, err = run("train", recipe, "--quiet", "--base", base, "--output", f"out/{n}")
        assert code == 0, err
        manifest = json.loads(Path(f"out/{n}/forget.json").read_text())
        config = json.loads(Path(f"out/{n}/adapter_config.json").read_text())
        assert manifest["base"]["name"] == config["base_model_name_or_path"] == "./base"  # and no Hub id
        asked = ("--prompt", "Who?", "--max-new-tokens", "1", "--json")
        before = run("generate", "--adapter", f"out/{n}", *asked)
        assert before[0] == 0, before
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert run("generate", "--adapter", f"../out/{n}", *asked)[:2] == before[:2]
        monkeypatch.chdir(tmp_path)
    os.rename(tmp_path / "base", tmp_path / "moved")
    refused("generate", "--adapter", "out/0", *asked, told="name its place now with --base")
    assert run("generate", "--adapter", "out/0", "--base", "moved", *asked)[0] == 0


def test_ports(refused, tiny, make_adapter, tiny_folder):
    words = ("serve", "--base", tiny_folder, "--adapter", make_adapter(tiny, "a"), "--port")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(*words, taken.getsockname()[1], told="cannot listen on")
    for port in ("-1", "65536", "http", "80.5", "1" * 30):
        refused(*words, port, told="--port")
    for host in ("256.1.1.1", "", "\udcff"):
        refused(*words, "0", "--host", host, told="")


def test_a_prompt_for_a_password_without_a_terminal(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    refused("keys", "new", "me", "--password", told="nothing was entered")
    assert not list(tmp_path.glob("me*"))


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (TypeError("Zorblax"), "TypeError in "),
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "not enough memory",
        ),
        (OSError(5, "It is broken", "x"), "It is broken: x"),
    ],
)
def test_what_nobody_foresaw_is_told_without_its_text(run, monkeypatch, problem, told):
    from unlearn_peft.adapters import read

    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(read, "read_bundle", fail)
    monkeypatch.setenv("UNLEARN_PEFT_TRACEBACK", "")
    code, _, err = run("inspect", "x")
    assert code == 2 and err.count("error: ") == 1 and told.split(" in ")[0] in err and "Zorblax" not in err, err
    if isinstance(problem, TypeError):
        assert "test_careless.py, line" in err and "code of your own" in err  # the innermost is this file
        monkeypatch.setenv("UNLEARN_PEFT_TRACEBACK", "1")
        with pytest.raises(TypeError):
            run("inspect", "x")


@pytest.mark.parametrize(
    "name", ["broken.py:f", "exits.py:f", "missing.py:f", "os:nope", ":", "a:", ":b", "..:x", "os"]
)
def test_code_of_the_users_own_that_cannot_be_loaded(refused, recipe, tiny, make_adapter, tiny_folder, name):
    Path("broken.py").write_text("x =")
    Path("exits.py").write_text("import sys; sys.exit(3)")
    refused("train", recipe, "--set", f"objective={json.dumps(name)}", told=f"objective '{name}'")
    adapter = make_adapter(tiny, "a")
    words = ("eval", adapter, "--base", tiny_folder, "--recipe", recipe)
    refused(*words, "--metric", name, told=f"cannot load the metric '{name}'")


def test_code_of_the_users_own_that_fails(run, recipe, monkeypatch):
    Path("mine.py").write_text("def f(*args, **kwargs):\n    return {}['Zorblax']\n")
    words = ("train", recipe, "--quiet", "--set", "objective=mine.py:f", "--output", "a")
    monkeypatch.setenv("UNLEARN_PEFT_TRACEBACK", "")
    code, _, err = run(*words)
    assert code == 2 and "KeyError in " in err and "mine.py, line 2, which is code of your own" in err, err
    assert "Zorblax" not in err and not Path("a").exists()


def test_output_that_nobody_reads():
    def shell(line, **environment):
        words = " ".join(COMMAND)
        done = subprocess.run(
            ["bash", "-c", line.format(words)], capture_output=True, text=True, env={**os.environ, **environment}
        )
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    assert shell("{} train --help | head -1; echo ${{PIPESTATUS[0]}}")[1].splitlines()[-1] in "01"
    code, _, err = shell("{} train --help > /dev/full")
    assert code == 2 and err == "error: No space left on device\n"
    for closed in (">&- 2>&-", "2> /dev/full"):
        assert shell(f"{{}} train none.yaml {closed}")[0] == 2, closed


def test_a_terminal_that_lacks_characters(monkeypatch):
    import io

    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["unlearn-peft", "tenant", "show"])
    with pytest.raises(SystemExit):
        cli.main()
    print(json.dumps("é 日本 \U0001f600 \udcff", ensure_ascii=False), file=out, flush=True)
    assert json.loads(out.buffer.getvalue().decode("latin-1")) == "é 日本 \U0001f600 \udcff"
