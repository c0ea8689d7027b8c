"""Command lines and recipes that hurried people might write, made from the CLI's own parser and the recipe's schema.

A new option or field is covered as soon as it exists: its kind says what is written there. `GOOD` only helps to get
further than the first error.
"""

import inspect
import json
import random
import shutil
import tarfile
from collections.abc import Mapping
from enum import EnumMeta
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
import yaml
from conftest import FORGET, RETAIN, make_tiny

from unlearn_peft.adapters.signing import new_key, sign
from unlearn_peft.cli import app
from unlearn_peft.recipe.load import _models_in
from unlearn_peft.recipe.schema import Recipe
from unlearn_peft.serve.policy.store import PolicyStore

INTS = [
    "0", "1", "-1", "2", "65536", "4294967297", "1" * 30, "1" * 5000, "1.0", "1.5", "0x10", "1e3", "", "one", "true",
]  # fmt: skip
FLOATS = ["0", "-0", "0.5", "-1", "nan", "inf", "-inf", "1e308", "1e-320", "1e999", "1,5", "", "x", "true"]
TEXTS = [
    "", " ", "x", "-", "--", "~", "~/x", "~no_such_user/x", "$HOME", "../..", "/", ".", "a" * 300, "é", "\udcff",
    "a\nb", "%s%n{}", "{prompt}", "all", "none", "null", "demo", "hub:a/b", "https://127.0.0.1:1/x", "file:///etc",
    "cpu", "cuda:99", "meta", "os:system", "os.py:x", "broken.py:f", "exits.py:f", "=", "a=b", "a=nan", "local",
    "demo.gguf",
]  # fmt: skip
PATHS = [
    "", ".", "..", "/", "none", "none/none", "full", "file", "file/x", "/dev/null", "/dev/null/x", "/proc/x", "loop",
    "~", "~no_such_user/x", "a" * 300, "é", "\udcff", "empty", "base", "broken_base", "no_tokenizer", "broken.gguf",
    "empty.gguf", "adapter", "cut", "no_json", "pickle", "elsewhere", "forget.jsonl", "retain.jsonl", "probes.jsonl",
    "empty.jsonl", "latin.csv", "surrogate.jsonl", "nul.jsonl", "good.yaml", "twice.yaml", "deep.yaml", "bomb.yaml",
    "latin.yaml", "tag.yaml", "list.yaml", "empty.yaml", "empty_file", "policy.yaml", "tenants.db", "key.pem",
    "key.pub", "hp.tar.gz", "new", "new.yaml", "new.tar.gz", "broken.tar.gz", "$HOME/x",
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**64, 10**30, 1.5, 1e308, float("nan"), float("inf"), "", " ", "1",
    "1e-3", "x", "~/x", "\ud800", "a\0b", "a" * 300, "nan", [], [1], ["x"], [[]], [None], {}, {"a": 1}, {"name": "x"},
    {"kind": "lora"}, {"path": None}, {"path": "x", "columns": {"prompt": "y"}}, "demo", "auto", "all",
]  # fmt: skip
GOOD = {
    "adapter": ["adapter", "other"], "adapters": ["adapter", "other"], "base": ["base", "./base", "plain"],
    "key": ["key.pem"], "recipes": ["recipe.yaml"], "recipe": ["good.yaml", "recipe.yaml"],
    "forget": ["forget.jsonl"], "retain": ["retain.jsonl"], "probes": ["probes.jsonl"],
    "neighbours": ["retain.jsonl"], "output": ["new", "nested/new"], "free_text": ["retain.jsonl"],
    "holdout": ["retain.jsonl"], "prompt": ["Who?", "日本"], "policy": ["policy.yaml", "tenants.db"],
    "store": ["tenants.db"], "trusted_keys": ["key.pub", "keys.yaml"], "keys": ["key.pub"],
    "source": ["hp.tar.gz", "adapter"], "target": ["new.tar.gz", "new"], "dtype": ["float32", "auto", "bfloat16"],
    "device": ["cpu"], "name": ["acme", "hp"], "file": ["policy.yaml"], "path": ["adapter"],
    "set_": ["steps=1", "seed=1"], "host": ["127.0.0.1"], "port": ["0"], "max_new_tokens": ["1", "3"], "k": ["2"],
    "rank": ["2"], "quantize": ["8", "int8"], "suite": ["quick"], "strength": ["1", "0.5"], "attacks": ["prefix"],
    "metric": ["metric.py:f"], "audit": ["new.jsonl"],
}  # fmt: skip
NEVER = {"sigstore", "engine", "tracker", "lm_eval"}  # a browser, a network, thousands of files
RECIPE = {
    "base": "./base", "forget": "forget.jsonl", "retain": "retain.jsonl", "steps": 1, "own_answers": 0,
    "anchor_batch": 0, "forget_batch": 2, "retain_batch": 2, "output": "new",
}  # fmt: skip


def commands() -> dict[tuple[str, ...], Any]:
    """Return every command of the CLI by its words, as the parser has it."""
    found = {}

    def walk(words, command):
        for name, inner in getattr(command, "commands", {}).items():
            walk((*words, name), inner)
        if not hasattr(command, "commands"):
            found[words] = command

    walk((), typer.main.get_command(app))
    return found


def invocation(rng: random.Random) -> tuple[list[str], bytes]:
    """Return a command's arguments, and what the file recipe.yaml holds."""
    found = commands()
    first = rng.choice(sorted({words[0] for words in found}) + ["train"] * 3 + ["generate", "eval"])
    words = rng.choice(sorted(words for words in found if words[0] == first))
    command = found[words]
    wrong = rng.choice([0, 0, 1, 1, 2, 5])
    chosen = set(rng.sample([p.name for p in command.params], k=min(wrong, len(command.params))))
    hints = get_type_hints(inspect.unwrap(command.callback))
    options, arguments = ["--base", "base"] if "base" in hints and rng.random() < 0.9 else [], []
    for param in command.params:
        is_bad = param.name in chosen
        kind = str(hints.get(param.name))
        if param.name in NEVER or not (is_bad or param.required or rng.random() < 0.15):
            continue
        for _ in range(rng.choice([1, 1, 1, 2]) if "list" in kind else 1):
            value = _value(rng, param.name, hints.get(param.name), is_bad)
            if param.param_type_name == "argument":
                arguments.append(value)
            elif "bool" in kind:
                options.append(rng.choice([*param.opts, *param.secondary_opts]))
            else:
                options += [param.opts[0] if param.opts[0].startswith("--") else param.opts[-1], value]
    noise = [rng.choice(["--no-such", "--help", "-x", "--", "extra"])] if rng.random() < 0.05 else []
    return [*words, *arguments, *options, *noise], _recipe(rng)


def _value(rng: random.Random, name: str, hint: Any, is_bad: bool) -> str:
    if not is_bad and name in GOOD:
        return rng.choice(GOOD[name])
    kinds = {hint, *get_args(hint), *(inner for outer in get_args(hint) for inner in get_args(outer))}
    if name == "set_":
        return f"{rng.choice(_fields(Recipe))}={rng.choice([*map(_text, VALUES), *PATHS, '[', '*x', '!!python/none'])}"
    if int in kinds:
        return rng.choice(INTS)
    if float in kinds:
        return rng.choice(FLOATS)
    if Path in kinds:
        return rng.choice(PATHS)
    return rng.choice(
        [*TEXTS, *PATHS, *(str(one.value) for kind in kinds if isinstance(kind, EnumMeta) for one in kind)]
    )


def _recipe(rng: random.Random) -> bytes:
    """Return a recipe with fields that are wrong, or text that is no recipe."""
    values: dict[str, Any] = dict(RECIPE)
    for name in rng.sample(_fields(Recipe), k=rng.choice([0, 0, 0, 1, 1, 2])):
        place, *inner = name.split(".")
        value = rng.choice([*VALUES, *PATHS])
        for part in reversed(inner):
            value = {part: value}
        old = values.get(place)
        values[place] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    text = yaml.dump(values) if rng.random() < 0.7 else json.dumps(values)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        lines = data.splitlines(keepends=True)
        lines.insert(
            rng.randrange(len(lines) + 1), rng.choice([*lines, b"\t", b"- x\n", b"&a [*a]\n", b"<<: {a: 1}\n"])
        )
        data = b"".join(lines)
    if rng.random() < 0.05:
        place = rng.randrange(len(data))
        data = (
            data[:place]
            + rng.choice([b"\xff", b"\0", b"{", b"'", b"*x", b"!!python/object:x", b""])
            + data[place + 3 :]
        )
    return data


def _fields(model: Any, prefix: str = "") -> list[str]:
    """Return the names of all settings, `adapter.r` among them."""
    names = [f"{prefix}no_such"]
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for inner in _models_in(field.annotation):
            names += _fields(inner, f"{prefix}{name}.")
    return sorted(set(names))


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def make_world(folder: Path) -> None:
    """Write what the commands may name: good things, and broken ones of each kind."""
    rows = {"forget": FORGET, "retain": RETAIN, "probes": [{"prompt": "Who?", "leak": ["Zorblax"]}], "empty": []}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    make_tiny(folder / "base", layers=1)
    shutil.copytree(folder / "base", folder / "plain")
    (folder / "plain" / "chat_template.jinja").unlink()
    for name in ("adapter", "other"):
        _lora(folder / "base", folder / name)
    for name, file, data in (
        ("broken_base", "model.safetensors", b"\x08\0\0\0\0\0\0\0nonsense"), ("no_tokenizer", "tokenizer.json", None),
        ("cut", "adapter_model.safetensors", b"\xff" * 20), ("no_json", "adapter_config.json", b"{"),
        ("pickle", "adapter_model.safetensors", None), ("elsewhere", "adapter_config.json", b'{"peft_type": "IA3"}'),
    ):  # fmt: skip
        shutil.copytree(folder / ("base" if "base" in name or "token" in name else "adapter"), folder / name)
        (folder / name / file).unlink() if data is None else (folder / name / file).write_bytes(data)
    (folder / "pickle" / "adapter_model.bin").write_bytes(b"x")
    for name in ("full", "empty"):
        (folder / name).mkdir()
    (folder / "full" / "x.txt").write_text("x")
    (folder / "loop").symlink_to("loop")
    texts = {
        "file": "x", "empty_file": "", "broken.gguf": "GGUFxxxx", "empty.gguf": "", "broken.tar.gz": "x",
        "good.yaml": yaml.dump(RECIPE), "twice.yaml": yaml.dump(RECIPE) + "steps: 2\n",
        "deep.yaml": "forget: " + "[" * 5000,
        "bomb.yaml": "k0: &k0 [x]\n" + "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}]\n" for n in range(1, 40)),
        "tag.yaml": "forget: !!python/object/apply:os.system [x]", "list.yaml": "- x", "empty.yaml": "",
        "surrogate.jsonl": '{"prompt": "\\ud800", "completion": "x"}\n',
        "nul.jsonl": '{"prompt": "a\\u0000", "completion": "x"}\n',
        "broken.py": "x =", "exits.py": "import sys; sys.exit(3)", "metric.py": "def f(*args, **kwargs): return [1.0]",
        "policy.yaml": "adapters: {hp: {path: adapter}}\ntenants: {acme: {forget: [hp]}}", "keys.yaml": "me: key.pub",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("latin.csv", "latin.yaml"):
        (folder / name).write_bytes("prompt,completion\nWär?,Ü\n".encode("latin-1"))
    new_key(folder / "key")
    sign(folder / "other", folder / "key.pem")
    with tarfile.open(folder / "hp.tar.gz", "w:gz") as tar:
        tar.add(folder / "adapter", "hp")
    store = PolicyStore(folder / "tenants.db", create=True)
    store.add("acme", who="x")
    store.close()


def _lora(base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
