"""The documentation holds: links lead somewhere, what it names exists, its commands and its Python run, it builds."""

import ast
import contextlib
import fnmatch
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import FORGET, RETAIN, logits
from serving import KEYS, make_policy_values, running

import unlearn_peft
from unlearn_peft import attach, cli, detach, load_base, unlearn
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.policy.policy import make_policy

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
THEIRS = ("docs/components.md", "docs/repro.md")  # of open-unlearning, named in comparison.md
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = typer.main.get_command(cli.app)
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def blocks(page, *languages):
    return [text for kind, text in FENCE.findall(page.read_text()) if kind in languages]


def anchors(page):
    """What can stand behind # in a link to a page, as GitHub makes it of headings."""
    found = []
    for heading in re.findall(r"^#{1,6} (.*)$", prose(page), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.strip().casefold()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


# --- links and names --------------------------------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        if not where.is_file() or (anchor and anchor not in anchors(where)):
            dead.append(target)
    assert not dead


def test_a_dead_link_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n\n[here](#one-two) [there](page.md#one-two) `[code](x.md)`\n\n```\n[code](y.md)\n```\n")
    test_links_lead_somewhere(page)
    for dead in ("[a](other.md)", "[a](#three)", "![a](picture.png)"):
        page.write_text(f"# One two\n\n{dead}\n")
        with pytest.raises(AssertionError):
            test_links_lead_somewhere(page)


@each_page
def test_files_that_are_named_exist(page):
    named = re.findall(r"(?<![\w./-])((?:docs|benchmarks|recipes|tests)/[\w./*-]*\w\.\w+)", page.read_text())
    assert not {name for name in named if name not in THEIRS and not list(ROOT.glob(name))}
    modules = re.findall(r"(?<![\w./-])(unlearn_peft/[\w./-]+)", page.read_text())
    modules = [name for name in modules if "." in name and not name.startswith("unlearn_peft/adapter")]
    assert not {name for name in modules if not (ROOT / name.rstrip(".")).exists()}


@each_page
def test_tests_that_are_named_exist(page):
    missing = []
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text()):
        tree = ast.parse((ROOT / file).read_text())
        if name not in [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            missing.append(f"{file}::{name}")
    assert not missing


def test_the_way_through_the_code_names_every_file():
    table = (ROOT / "README.md").read_text().partition("## The way through the code")[2].partition("\n## ")[0]
    names = re.findall(r"`(?!unlearn_peft/`)([\w*/]+(?:\.py|/))`", table)
    package = Path(unlearn_peft.__file__).parent
    for file in package.rglob("*.py"):
        path = str(file.relative_to(package))
        known = any(
            path.startswith(name) if name.endswith("/") else fnmatch.fnmatch(path, name) or file.name == name
            for name in names
        )
        assert known or file.name == "__init__.py", f"{path} is not in README.md's table"
    for name in names:
        assert list(package.rglob(name.rstrip("/"))), f"{name} is in README.md's table, and not there"


def test_the_walks_through_the_code_name_what_is_there():
    package = Path(unlearn_peft.__file__).parent
    walks = (DOCS / "architecture.md").read_text().partition("## Walk 1")[2]
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", walks)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((package / file).read_text())
        assert not name or name in [getattr(node, "name", None) for node in tree.body], f"{file}::{name}"


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference" / "python.md").read_text()
    assert not [name for name in unlearn_peft.__all__ if not re.search(rf":: {name}\b", text)]
    for name in re.findall(r"^.. auto\w+:: (unlearn_peft\.\w[\w.]*)", text, re.MULTILINE):
        place, _, inner = name.rpartition(".")
        assert hasattr(importlib.import_module(place), inner), name


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page):
    """Every command line on a page: in blocks, where it is whole, and between backticks, where it may not be."""
    for text in blocks(page, "", "console", "bash"):
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"unlearn-peft \w|(accelerate|python -m torch).* -m unlearn_peft.cli ", line):
                yield line, True
            yield from ((inner, True) for inner in re.findall(r"\$\((unlearn-peft [^)]*)\)", line))
    for text in re.findall(r"`(unlearn-peft [a-z][^`]*)`", prose(page)):
        if "--" in text and "..." not in text and "[" not in text:
            yield " ".join(text.split()), False


def parsed(line):
    """Parse one line as the command line would, without running it; returns the command's name."""
    line = re.split(r" [|&]|;", line)[0]
    words = shlex.split(re.sub(r"\$\([^)]*\)", "IT", line), comments=True)
    words = words[words.index("unlearn_peft.cli") + 1 :] if "unlearn_peft.cli" in words else words[1:]
    command, name = COMMANDS, "unlearn-peft"
    while hasattr(command, "commands"):
        name, words = words[0], words[1:]
        command = command.commands[name]
    command.make_context(name, words)
    return name


@each_page
def test_commands_exist_with_their_options(page):
    for line, whole in commands(page):
        try:
            parsed(line)
        except (Exception, SystemExit) as error:
            assert not whole and re.search("Missing|requires an argument", str(error)), (
                f"{line}: {type(error).__name__}: {error}"
            )


def test_a_wrong_option_would_be_found():
    assert parsed("unlearn-peft eval out/hp --recipe mine.yaml --k 8 | tail") == "eval"
    for wrong in ("eval out/hp --recipes x", "evaluate out/hp", "eval out/hp --k many", "stack a b"):
        with pytest.raises((Exception, SystemExit)):
            parsed(f"unlearn-peft {wrong}")


# --- the how-to pages on a tiny model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """Three adapters for the tiny base."""
    out, base = tmp_path_factory.mktemp("made"), load_base(str(tiny_folder))
    small = dict(forget=FORGET, retain=RETAIN, steps=3, own_answers=0, anchor_batch=2, warmup_steps=0, quiet=True)
    for seed, name in enumerate(("harry_potter", "mine", "other")):
        unlearn(base, **small, seed=seed, learning_rate=5e-3, output=str(out / name))
    return out


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A folder as the pages' reader has it, with adapters for the base that is called `demo` there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / "out")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setenv("UNLEARN_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "150")
    return tmp_path


def here(text, tiny_folder):
    """A page's code, with the tiny base in the place of the demo's."""
    return text.replace('load_base("demo")', f'load_base("{tiny_folder}")').replace(
        "--base demo", f"--base {tiny_folder}"
    )


def called(line, monkeypatch, capsys):
    """Run a command in this process; returns its exit code, and what it printed."""
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    with pytest.raises(SystemExit) as done:
        cli.main()
    printed = capsys.readouterr()
    return done.value.code or 0, printed.out, printed.err


def test_the_commands_of_handing_round_run(folder, tiny_folder, monkeypatch, capsys):
    page = DOCS / "how-to" / "distribute.md"
    lines = [line for text in blocks(page, "") for line in text.splitlines() if "hub:" not in line and "$(" not in line]
    ran = []
    for line in lines:
        if "https:" not in line:
            code, out, err = called(here(line, tiny_folder), monkeypatch, capsys)
            assert code == 0, f"{line}: {err}"
            ran.append((line, out))
    told = dict(ran)
    assert len(ran) >= 8 and "#sha256=" in told["unlearn-peft push out/harry_potter hp.tar.gz"]
    assert (folder / "out/unpacked/adapter_config.json").is_file() and (folder / "out/hp8bit/forget.json").is_file()
    assert any(out.startswith("signed by me: ") for out in told.values())
    weights = folder / "out/harry_potter/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    line = next(line for line in told if " verify " in line)
    code, _, err = called(line, monkeypatch, capsys)
    assert code == 2 and err.startswith("error: ")


def test_the_commands_of_attaching_run(folder, tiny_folder, monkeypatch, capsys):
    page = DOCS / "how-to" / "attach.md"
    lines = [line for text in blocks(page, "") for line in text.splitlines()]
    assert len(lines) == 6
    for line in lines:
        code, _, err = called(here(line, tiny_folder), monkeypatch, capsys)
        assert code == 0, f"{line}: {err}"


@pytest.mark.parametrize("name", ["attach", "distribute", "serve", "evaluate"])
def test_the_python_of_the_how_to_pages_runs(name, folder, tiny, tiny_folder, monkeypatch, capsys):
    code, *_ = called("unlearn-peft keys new keys/me", monkeypatch, capsys)
    code += called("unlearn-peft sign out/harry_potter --key keys/me.pem", monkeypatch, capsys)[0]
    assert code == 0
    texts = blocks(DOCS / "how-to" / f"{name}.md", "python")
    assert texts
    scope = {}
    with client_here(folder, tiny_folder) if name == "serve" else contextlib.nullcontext() as url:
        for text in texts:
            text = here(text, tiny_folder)
            text = text.replace("http://127.0.0.1:8000", str(url)).replace("uf-...", KEYS["alice"])
            exec(compile(text, name, "exec"), scope)
    if name == "attach":
        attach(tiny, "out/harry_potter")
        expected = logits(tiny)
        detach(tiny)
        assert (logits(scope["base"]) == expected).all()  # what the last block left attached
    if name == "serve":
        assert scope["answer"].choices[0].message.content is not None and scope["logits"].shape[0] == 2


@contextlib.contextmanager
def client_here(folder, tiny_folder):
    """A server as the page has it: one tenant that forgets `hp`."""
    values = make_policy_values(
        {"hp": folder / "out/harry_potter", "mine": folder / "out/mine"}, {"alice": {"hp": 1.0}}, {"alice": ["mine"]}
    )
    with running(LocalEngine(load_base(str(tiny_folder))), make_policy(values, "test")) as (_, url):
        yield url


def test_the_python_of_the_readme_runs(folder, tiny_folder, write_rows):
    write_rows("forget.jsonl", FORGET), write_rows("retain.jsonl", RETAIN)
    ours = next(text for text in blocks(ROOT / "README.md", "python") if "unlearn(" in text)
    shutil.rmtree("out/mine")
    scope = {}
    exec(compile(here(ours, tiny_folder).replace('output="out', 'steps=2, output="out'), "readme", "exec"), scope)
    assert scope["adapter"].path == Path("out/mine") and unlearn_peft.attached(scope["base"]) == {}


# --- generated pages and the build ------------------------------------------------------------------------------------


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_says():
    for name, text in loaded(DOCS / "generate.py").pages().items():
        assert (DOCS / name).read_text() == text, f"docs/{name} is out of date: run `python docs/generate.py`"
        assert text.count("\n## ") > 2


def test_the_demo_is_shown_whole_and_cut_short(tmp_path, capsys):
    readme = loaded(ROOT / "benchmarks" / "readme.py")
    shown = {page: re.search(r"<!-- demo -->\n(.*)\n<!-- /demo -->", page.read_text(), re.DOTALL)[1]
             for page in (readme.README, readme.RESULTS)}  # fmt: skip
    assert readme.shortened(shown[readme.RESULTS]) == shown[readme.README]
    for name in readme.BLOCKS:
        assert readme.RESULTS.read_text().count(f"<!-- {name} -->") == 1
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    readme.put(page, "x", "new \\1")
    assert page.read_text() == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"
    with pytest.raises(SystemExit, match="expected the markers"):
        readme.put(page, "y", "new")


@pytest.mark.long
def test_it_builds_without_a_warning(tmp_path):
    missing = [name for name in ("sphinx", "myst_nb", "furo") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install 'unlearn-peft[docs]')")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--builder", "html"]
    done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    python = (tmp_path / "html/reference/python.html").read_text()
    for name in unlearn_peft.__all__:
        assert f'id="unlearn_peft.{name}"' in python
