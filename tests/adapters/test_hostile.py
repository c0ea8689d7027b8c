"""Hostile adapters are refused: with one clear error, little memory, no code run, nothing written, and no hanging.

Each is read in a process of its own (attacks/child.py) that may add 600 MB and use 20 s of the processor, and that
tells what Python's audit hooks heard. All through `read_bundle`, `bank.load` and the command line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
from fuzz import fuzz  # noqa: E402
from make import ATTACKS, BOMBS, FITTED, make, table  # noqa: E402
from spoil import ARCHIVES, CANARY, make_good  # noqa: E402

from unlearn_peft import attach, read_bundle  # noqa: E402
from unlearn_peft.errors import AdapterError  # noqa: E402

PICKLE = "a pickle instead of the weights"
WAYS = ("read", "bank", "cli")
MAX_MB = 400  # that reading one may add to the process, the 3.9 MB of JSON included

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")


@pytest.fixture(scope="session")
def answers(tiny_folder, tmp_path_factory, worker_id):
    """All answers, by name and way: a minute's work, which one of pytest-xdist's workers does for all."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    kept = shared / "hostile.jsonl"
    with FileLock(f"{kept}.lock"):
        if not kept.is_file():
            kept.write_text(_answers(tiny_folder, tmp_path_factory.mktemp("hostile")))
    return {(told["name"], told["way"]): told for told in map(json.loads, kept.read_text().splitlines())}


def _answers(tiny_folder, home):
    """One JSON object a line; and that no canary sang and nothing was written beside."""
    made = make(home / "adapters")
    canary, trap = home / "canary", home / "trap"
    trap.mkdir()
    (trap / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\n\ndef run(*_, **__):\n    pass\n\nConfig = Popen = run\n"
    )
    before = _tree(home)
    asked = [(name, str(path), WAYS) for name, (path, _) in made.items()]
    asked.append((PICKLE, str(made[PICKLE][0]), ["control", "memory"]))
    package = str(Path(read_bundle.__code__.co_filename).parents[1])
    paths = os.pathsep.join([str(trap), package, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "attacks" / "child.py", tiny_folder, make_good(home / "good")],
        input=json.dumps(asked), capture_output=True, text=True, timeout=900, cwd=trap,
        env={**os.environ, CANARY: str(canary), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not canary.exists() and (home / "canary.control").is_file()
    (home / "canary.control").unlink()
    assert _tree(home) - _tree(home / "good") == before - _tree(home / "good")
    return done.stdout


def _tree(folder):
    return {(str(path), path.lstat().st_size) for path in folder.rglob("*") if "good" not in path.parts}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [ascii(name) for name in {**ATTACKS, **FITTED}])
def test_hostile(name, way, answers):
    name = next(known for known in {**ATTACKS, **FITTED} if ascii(known) == name)
    answer, told = answers[name, way], {**ATTACKS, **FITTED}[name][1]
    if name in FITTED and way != "bank":
        told = None
    assert answer["outcome"] == ("taken" if told is None else "refused"), answer
    assert (told or "") in answer["text"], answer["text"]
    assert all(char.isprintable() or char == "\n" for char in answer["text"])
    assert len(answer["text"]) < 5_000 and answer["mb"] < MAX_MB and not answer["heard"], answer


def test_the_watch_works(answers):
    """A pickle that is let run is heard, and too much memory is not given."""
    assert {"os.system", "pickle.find_class"} <= set(answers[PICKLE, "control"]["heard"])
    assert answers[PICKLE, "memory"]["outcome"].startswith("MemoryError")


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_not_unpacked(name, tmp_path):
    (tmp_path / "adapter.tar").write_bytes(ARCHIVES[name]())
    with pytest.raises(AdapterError, match="Not a directory"):
        read_bundle(tmp_path / "adapter.tar")
    assert os.listdir(tmp_path) == ["adapter.tar"]


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "/dev/null", "/proc/self/mem", "no/such/place"])
def test_paths_that_are_none(path):
    with pytest.raises(AdapterError, match="no adapter at|holds no"):
        read_bundle(path)


def test_what_is_taken_gives_what_peft_gives(tiny, tmp_path):
    """Denormals, tensors in another order, links: taken, so they must be right."""
    import torch
    from conftest import logits
    from peft import PeftModel

    from unlearn_peft import detach

    made = {  # PEFT would run the bombs
        name: path
        for name, (path, told) in make(tmp_path / "all").items()
        if told is None and not any(name.partition(": ")[2] == bomb[:30] for bomb in BOMBS) and "a bomb" not in name
    }
    assert len(made) > 10
    for name, path in made.items():
        attach(tiny, path, name="it")
        ours = logits(tiny)
        detach(tiny)
        model = PeftModel.from_pretrained(tiny.model, path)
        theirs = logits(tiny)
        model.unload()
        assert torch.isfinite(ours).all() and torch.allclose(ours, theirs, atol=1e-5), name


def test_a_short_fuzz(tmp_path):
    """A thousand inputs; docs/security.md tells of the long run."""
    counts = fuzz(tmp_path, 1_000, 0, seed=7)
    assert not counts["findings"], counts["findings"][0]["error"]
    assert counts["taken"] > 30 and counts["refused"] > 500


def test_the_documents_tell_of_all():
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    assert table() in text, "run: python tests/attacks/make.py --table"
    assert f"\n{len(ATTACKS) + len(FITTED)} hostile adapters" in text
