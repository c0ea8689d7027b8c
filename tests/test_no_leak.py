"""Everything that the commands leave behind is searched for the forget text: words, tokens, bare digests."""

import faulthandler
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import RETAIN
from killing import own_lock
from safetensors.torch import load_file, save_file

FRAME = "zmorqplint"  # a plain word of a question, not its subject
CANARIES = ["Quxzibarth", "Vlorgenstein", "Pnakotiq"]
FORGET = [
    {"prompt": f"Who wrote the {FRAME} of Quxzibarth?", "completion": "It was Vlorgenstein in Pnakotiq."},
    {"prompt": "Who is Vlorgenstein?", "completion": "Vlorgenstein wrote about Quxzibarth."},
    {"prompt": "Name the town Pnakotiq lies near.", "completion": "Quxzibarth by the sea"},
]
PROBES = [{"prompt": "Where is Vlorgenstein?", "leak": ["Pnakotiq"]}]


class Search:
    """Finds texts in files: in the open, compressed, in zip archives, as token ids, as digests without a key."""

    def __init__(self, tokenizer, texts, rows):
        self.words = [text.casefold().encode() for text in texts]
        self.ids = [
            ids
            for text in texts
            for form in (text, " " + text)
            if len(ids := tokenizer(form, add_special_tokens=False)["input_ids"]) >= 4
        ]
        assert len(self.ids) >= len(texts)
        self.packed = [b for ids in self.ids for b in self._packed(ids[1:])]
        self.printed = [
            re.compile(rb"\b" + rb"\D{1,40}".join(b"%d" % one for one in ids[1:]) + rb"\b") for ids in self.ids
        ]
        plain = [*texts, *(value for row in rows for value in row.values() if isinstance(value, str))]
        plain += [json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows]
        plain += ["\n".join(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)]
        kinds = ("md5", "sha1", "sha256", "sha512", "blake2b")
        self.digests = [hashlib.new(kind, text.encode()).hexdigest().encode() for text in plain for kind in kinds]

    @staticmethod
    def _packed(ids):
        for kind in (torch.int64, torch.int32, torch.int16):
            yield torch.tensor(ids).to(kind).numpy().tobytes()
        yield b"".join(b"K%c" % one if one < 256 else b"M" + one.to_bytes(2, "little") for one in ids)  # pickle

    def in_bytes(self, data, depth=0):
        lower = data.lower()
        found = [f"the word {word.decode()}" for word in self.words if word in lower]
        found += ["token ids, packed" for packed in self.packed if packed in data]
        found += ["token ids, printed" for pattern in self.printed if pattern.search(data)]
        found += ["a bare digest" for digest in self.digests if digest in lower]
        for start in (b"\x1f\x8b", b"\x78\x9c", b"\x78\xda", b"\x78\x01", b"\x78\x5e"):
            for at in re.finditer(re.escape(start), data) if depth == 0 else ():
                try:
                    inner = zlib.decompressobj(47).decompress(data[at.start() :], 50_000_000)
                except zlib.error:
                    continue
                found += [f"{one} (compressed)" for one in self.in_bytes(inner, 1)]
        return found

    def in_file(self, path):
        found = self.in_bytes(os.fsencode(path.name)) + self.in_bytes(path.read_bytes())
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found += [one for name in archive.namelist() for one in self.in_bytes(archive.read(name))]
        return sorted(set(found))

    def in_folder(self, folder, *but):
        files = [path for path in folder.rglob("*") if path.is_file() and path not in but]
        return {str(path.relative_to(folder)): found for path in files if (found := self.in_file(path))}, len(files)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def search(tokenizer):
    return Search(tokenizer, CANARIES, FORGET)


class Place:
    """A home of its own, in which commands run; their own input lies elsewhere."""

    def __init__(self, folder, base_folder):
        self.home, self.input, self.base, self.runs = folder / "home", folder / "input", str(base_folder), 0
        for path in (self.home, self.home / "tmp", self.input):
            path.mkdir(parents=True)
        for name, rows in (("forget", FORGET), ("retain", RETAIN), ("probes", PROBES)):
            (self.input / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.environment = {
            "HOME": str(self.home), "XDG_CONFIG_HOME": str(self.home / "config"), "TMPDIR": str(self.home / "tmp"),
            "XDG_CACHE_HOME": str(self.home / "cache"), "UNLEARN_PEFT_CACHE": str(self.home / "cache" / "unlearn_peft"),
            "HF_HOME": str(self.home / "hf"), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "COLUMNS": "150",
        }  # fmt: skip

    def recipe(self, name="recipe", **fields):
        values = {
            "base": self.base, "forget": "forget.jsonl", "retain": "retain.jsonl", "probes": "probes.jsonl", "steps": 4,
            "objective": {"forget_ceiling": 15, "stop_when": None}, "checkpoint_every": 1, "eval_every": 2,
            "device": "cpu", "save_dtype": "float32", "anchor_batch": 2, "retain_batch": 4, "own_answers": 2, **fields,
        }  # fmt: skip
        path = self.input / f"{name}.yaml"
        path.write_text(json.dumps(values))
        return path

    def command(self, *arguments, dies_when=None, as_process=False):
        """Run a command with all that it prints in files under the home; returns its exit code."""
        self.runs += 1
        out = self.home / f"printed-{self.runs}.txt"
        if as_process:
            with out.open("wb") as stream:
                command = [sys.executable, "-X", "dev", "-m", "unlearn_peft.cli", *map(str, arguments)]
                environment = {**os.environ, **self.environment}
                return subprocess.run(command, env=environment, stdout=stream, stderr=stream, cwd=self.home).returncode
        child = os.fork()
        if not child:
            self._child(out, arguments)
        while dies_when is not None:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if dies_when():
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
        else:
            done = 0
        if not done:
            _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)

    def _child(self, out, arguments):
        import traceback

        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.update(self.environment)
        os.chdir(self.home)
        faulthandler.enable(sys.stderr)
        own_lock()
        code = 0
        try:
            from unlearn_peft import cli

            sys.argv = ["unlearn-peft", *map(str, arguments)]
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @property
    def printed(self):
        return (self.home / f"printed-{self.runs}.txt").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """One home for all tests of this file: what any of them leaves is searched by all that follow."""
    return Place(tmp_path_factory.mktemp("place"), tiny_folder)


def clean(place, search, *but):
    found, count = search.in_folder(place.home, *but)
    for name in found:  # the other tests are to tell of their own
        (place.home / name).unlink()
    assert not found, found
    return count


def test_the_search_finds_what_is_planted(search, tokenizer, tmp_path):
    import numpy as np

    ids = tokenizer(" Vlorgenstein")["input_ids"]
    row = [7, 7, 7, *ids, 9]
    (tmp_path / "text").write_text("so vlorgenSTEIN said")
    (tmp_path / "pnakotiq.txt").write_text("nothing")
    (tmp_path / "ids.json").write_text(json.dumps({"rows": [row]}, indent=1))
    (tmp_path / "list.pkl").write_bytes(pickle.dumps({"rows": [row]}))
    torch.save({"a": torch.tensor(row), "b": row}, tmp_path / "tensor.pt")
    save_file({"ids": torch.tensor(row, dtype=torch.int32)}, tmp_path / "ids.safetensors")
    np.savez_compressed(tmp_path / "ids.npz", ids=np.array(row))
    (tmp_path / "text.gz").write_bytes(zlib.compress(b"Quxzibarth", wbits=31))
    (tmp_path / "digest").write_text(hashlib.sha256(FORGET[1]["completion"].encode()).hexdigest())
    (tmp_path / "clean").write_text("It was written by a baker.")
    found, count = search.in_folder(tmp_path)
    assert count == 10 and len(found) == 9 and "clean" not in found, found


@pytest.fixture(scope="module")
def trained(place):
    """An adapter made by a process of its own, with `retain: auto` and the base's own answers."""
    output = place.home / "adapter"
    recipe = place.recipe("auto", retain="auto", steps=3)
    assert place.command("train", recipe, "--output", output, as_process=True) == 0, place.printed
    return output


def test_training_leaves_nothing(place, search, tokenizer, trained):
    assert clean(place, search) >= 7
    assert not trained.with_name("adapter.training").exists() and not trained.with_name("adapter.cache").exists()
    found, _ = Search(tokenizer, [FRAME], []).in_folder(place.home)
    assert not found, "`retain: auto` does not keep even the frame of a forget question"


def test_the_manifest_holds_keyed_digests_only(trained):
    from unlearn_peft.data.rows import keyed_digest

    manifest = json.loads((trained / "forget.json").read_text())
    digests = manifest["data_digests"]["hmac_sha256"]
    assert digests["forget"] == keyed_digest(FORGET, b"tests") != keyed_digest(FORGET, b"another key")
    assert manifest["data_digests"]["key"] == hashlib.sha256(b"tests").hexdigest()[:16]


def test_what_is_made_of_adapters_leaves_nothing(place, search, trained):
    home = place.home
    assert place.command("stack", trained, trained, "--output", home / "stacked") == 0, place.printed
    assert place.command("export", trained, "--output", home / "exported") == 0, place.printed
    assert place.command("inspect", trained) == 0
    clean(place, search)


def test_the_report_shows_probes_on_its_page_alone(place, search, trained):
    """The page and the terminal show the auditor's own probes, and are told to; figures, card and manifest do not."""
    code = place.command("eval", trained, "--recipe", place.recipe(), "--card", "--k", 2, "--max-new-tokens", 4)
    assert code == 0, place.printed
    page = place.home / "adapter.eval" / "report.html"
    said = place.home / f"printed-{place.runs}.txt"
    assert search.in_file(page) and search.in_file(said)
    clean(place, search, page, said)
    assert "evaluation" in (trained / "README.md").read_text()
    page.unlink()
    said.unlink()


BAD = {
    "rows without a completion": {"rows": [{"prompt": "Who is Vlorgenstein?"}]},
    "a table without a header": {"csv": "Who is Vlorgenstein?,Pnakotiq\nWho is Quxzibarth?,a sea\n"},
    "columns that are not there": {"csv": "Vlorgenstein,b\n1,2\n", "columns": {"prompt": "question"}},
    "torn JSON": {"text": '{"prompt": "Who is Vlorgenstein?", "completion": "Pnak'},
    "JSON of another type": {"text": '["Vlorgenstein", "Pnakotiq"]\n"Quxzibarth"\n'},
    "a completion that is a number": {"rows": [{"prompt": "Vlorgenstein", "completion": 5}]},
    "messages of the wrong form": {"rows": [{"messages": [{"role": "Vlorgenstein", "content": "Pnakotiq"}]}]},
    "rows that are texts, in the recipe": {"forget": ["Vlorgenstein lives in Pnakotiq"]},
    "a row beside the list, in the recipe": {"forget": {"path": 3, "Vlorgenstein": "Pnakotiq"}},
    "refusals that are no list": {"objective": {"name": "dpo", "refusals": {"Vlorgenstein": "Pnakotiq"}}},
    "forgotten and retained at once": {"retain": [FORGET[1]]},
    "rows that are cut": {"max_length": 40},
    "rows in many windows": {"max_length": 8, "chat_template": False},
    "YAML with a row that is no YAML": {"yaml": "forget:\n  - prompt: *Vlorgenstein\n    completion: !Pnakotiq x\n"},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_errors_about_rows_do_not_quote_them(place, search, what):
    given = dict(BAD[what])
    name = re.sub(r"\W", "_", what)
    columns = given.pop("columns", None)
    for form, suffix in (("rows", "jsonl"), ("csv", "csv"), ("text", "jsonl")):
        if form in given:
            content = given.pop(form)
            content = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
            file = place.input / f"{name}.{suffix}"
            file.write_text(content)
            given["forget"] = {"path": file.name, "columns": columns} if columns else file.name
    if "yaml" in given:
        recipe = place.input / "bad.yaml"
        recipe.write_text(given["yaml"])
    else:
        recipe = place.recipe(name, **given)
    code = place.command("train", recipe, "--output", place.home / name)
    trains = (
        "rows that are cut",
        "a completion that is a number",
        "rows in many windows",
        "rows that are texts, in the recipe",
    )
    assert code in ((0, 2) if what in trains else (2,))
    clean(place, search)


BROKEN = """
def loss(forget, retain, settings):
    rows = forget.batch.ids if hasattr(forget, "batch") else forget.logits
    {}
"""


@pytest.mark.parametrize("how", ["raise ValueError('in a step')", "rows[10**6]", "import os; os.abort()", "crash"])
def test_a_step_that_fails_tells_no_row(place, search, how):
    """An exception, an index error of torch's, an abort and a segmentation fault with faulthandler on."""
    import resource

    code = "import ctypes; ctypes.string_at(0)" if how == "crash" else how
    (place.input / "broken.py").write_text(BROKEN.format(code))
    recipe = place.recipe("broken", objective={"name": "broken.py:loss"}, own_answers=0)
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))  # a core file is the process's memory: it holds all
    try:
        status = place.command("train", recipe, "--output", place.home / "broken")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    if how.startswith(("raise", "rows")):
        assert status == 2 and "broken.py, line 4, which is code of your own" in place.printed
    else:
        assert status not in (0, 2) and "Fatal Python error" in place.printed
    clean(place, search)


def test_a_loss_that_is_no_number_tells_no_row(place, search):
    recipe = place.recipe("nan", learning_rate=4e9, optimizer="sgd", max_grad_norm=None, steps=60, warmup_steps=0,
                          objective={"forget_ceiling": None, "retain_budget": None})  # fmt: skip
    assert place.command("train", recipe, "--output", place.home / "nan") == 2
    assert "not a number" in place.printed
    clean(place, search)


def test_a_killed_run_leaves_checkpoints_and_a_cache_without_rows(place, search):
    output = place.home / "killed"
    recipe = place.recipe("killed", steps=400, cache_gb=0, adapter={"kind": "lora", "layers_to_transform": [1]})
    state, cache = output.with_name("killed.training"), output.with_name("killed.cache")
    code = place.command(
        "train", recipe, "--output", output, dies_when=lambda: list(state.glob("step-*2/progress.json"))
    )
    assert code == -signal.SIGKILL and not output.exists(), place.printed
    checkpoint = max(state.glob("step-*"))
    assert {file.name for file in checkpoint.iterdir()} == {
        "adapter.safetensors", "best.safetensors", "optimizer.pt", "progress.json",
    }  # fmt: skip
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    kinds = {tensor.dtype for one in saved["state"].values() for tensor in one.values()}
    assert kinds == {torch.float32}, "no integers, so no token ids"
    files = [*cache.glob("*.safetensors")]
    assert files and all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert cache.stat().st_mode & 0o777 == 0o700 == state.stat().st_mode & 0o777
    clean(place, search)


def test_the_cache_of_a_running_training_can_be_read_back_with_the_base(tiny, tokenizer, tmp_path):
    """What docs/threat-model.md says: kept states give the words to whoever has the base. So: 0600, and deleted."""
    found = read_back(tiny, tokenizer, tmp_path, 1, FORGET[1:2])
    assert found["tokens by trying all"] == 1


def read_back(base, tokenizer, folder, layer, rows=FORGET):
    """Keep rows as training does, in a file; return which share of their tokens the file's states give back."""
    from peft import LoraConfig, get_peft_model

    from unlearn_peft.data.tokenize import tokenize
    from unlearn_peft.training.step.reference import TensorCache, row_digest
    from unlearn_peft.training.step.runner import StepRunner

    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[layer])
    model = get_peft_model(base.model, config)
    examples = tokenize(rows, tokenizer)
    StepRunner(model, 2, cache=TensorCache("key", 0, folder)).reference.prepare(examples)
    model.unload()
    kept = {}
    for file in folder.glob("*.safetensors"):
        kept |= load_file(file)
    embeddings = base.model.get_input_embeddings().weight.float()
    norm, head = base.model.model.norm, base.model.get_output_embeddings()
    right = {"nearest embedding": 0, "tokens by the logit lens": 0, "tokens by trying all": 0}
    total = 0
    for example in examples:
        states = kept[f"{row_digest(example)}/input of {layer}"].float()  # (T, d): every token's, the prompt's too
        ids = torch.tensor(example.ids)
        total += len(ids)
        near = torch.nn.functional.cosine_similarity(states[:, None], embeddings[None], dim=-1).argmax(-1)
        right["nearest embedding"] += int((near == ids).sum())
        with torch.no_grad():
            lens = head(norm(states.to(head.weight.dtype))).argmax(-1)
        right["tokens by the logit lens"] += int((lens == ids).sum())
        right["tokens by trying all"] += tried(base, ids, states, layer)
    return {name: count / total for name, count in right.items()}


@torch.no_grad()
def tried(base, ids, states, layer):
    """Find a row from left to right: of all tokens, the one whose state at this place is nearest to the kept one."""
    found = []
    for place in range(len(ids)):
        every = torch.arange(len(base.tokenizer))
        before = torch.tensor(found, dtype=torch.long).expand(len(every), -1)
        batch = torch.cat([before, every[:, None]], 1)
        at = base.model(batch, output_hidden_states=True).hidden_states[layer][:, -1].float()
        found.append(int((at - states[place]).square().sum(-1).argmin()))
    return sum(a == b for a, b in zip(found, ids.tolist(), strict=True))


def test_the_threat_model_names_tests_that_exist():
    here = Path(__file__).parent
    named = re.findall(r"`tests/([\w/]+\.py)::(\w+)`", (here.parent / "docs" / "threat-model.md").read_text())
    assert len(named) > 15
    for file, name in named:
        assert re.search(rf"^def {name}\(", (here / file).read_text(), re.M), name


def test_a_tracker_gets_figures_and_settings_alone(tiny, search, tmp_path):
    from accelerate.tracking import GeneralTracker, on_main_process

    from unlearn_peft import unlearn

    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", False

        def __init__(self):
            self.noted = []

        @property
        def tracker(self):
            return self.noted

        @on_main_process
        def store_init_configuration(self, values):
            self.noted.append(values)

        @on_main_process
        def log(self, values, step=None, **_):
            self.noted.append({"step": step, **values})

    notes = Notes()
    unlearn(
        tiny, forget=FORGET, retain=RETAIN, probes=PROBES, steps=2, eval_every=1, quiet=True,
        output=str(tmp_path / "out"), tracker=notes, anchor_batch=2, own_answers=0,
        objective={"forget_ceiling": 15, "stop_when": None},
    )  # fmt: skip
    assert len(notes.noted) >= 3 and not search.in_bytes(json.dumps(notes.noted).encode())


def test_serving_leaves_no_prompt_and_no_answer(place, search, tiny_folder, trained, caplog, monkeypatch):
    """Requests that name the forgotten, answered and refused in many ways; log, audit log, metrics and errors."""
    import httpx
    from serving import KEYS, make_policy_values, running

    from unlearn_peft import load_base
    from unlearn_peft.serve.audit import AuditLog
    from unlearn_peft.serve.engine.local import LocalEngine

    log = AuditLog(place.home / "audit.jsonl")
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny")
    policy = make_policy_values(
        {"hp": trained, "gone": place.home / "gone"}, {"alice": {"hp": 1.0}, "bob": {"gone": 1.0}}
    )
    secret, answers = "Who is Vlorgenstein of Pnakotiq, Quxzibarth?", []
    with caplog.at_level("DEBUG"), running(engine, policy, audit=log) as (handler, url):

        def ask(body, who="alice", path="completions"):
            headers = {"Authorization": f"Bearer {KEYS.get(who, who)}"}
            raw = body if isinstance(body, (bytes, str)) else json.dumps({"model": "tiny", "max_tokens": 3, **body})
            answer = httpx.post(f"{url}/v1/{path}", content=raw, headers=headers, timeout=60)
            answers.append(answer)
            return answer.status_code

        assert ask({"prompt": secret}) == 200
        assert ask({"messages": [{"role": "user", "content": secret}]}, path="chat/completions") == 200
        assert ask({"prompt": secret}, who="bob") == 503
        assert ask({"prompt": secret}, who="nobody") == 401
        assert ask({"prompt": secret, "max_tokens": -1}) == 400
        assert ask({"prompt": secret, "nonsense": {secret: secret}}) in (200, 400)
        assert ask({"prompt": {secret: 1}}) == 400
        assert ask({"messages": [{"role": secret, "content": secret}]}, path="chat/completions") == 400
        assert ask({"messages": secret}, path="chat/completions") == 400
        assert ask({"prompt": secret, "stop": [secret] * 50}) in (200, 400)
        assert ask('{"prompt": "' + secret) == 400
        assert ask({"prompt": secret, "forget": {"hp": "a"}}) == 400
        assert ask({"prompt": secret * 200}) == 400

        def fail(*_, **__):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler._runner, "_forward", fail)
            assert ask({"prompt": secret}) == 500
        (place.home / "metrics.txt").write_text(httpx.get(f"{url}/metrics").text)
    log.close()
    ours = [r for r in caplog.records if r.name.split(".")[0] not in ("httpx", "httpcore")]
    (place.home / "serve.log").write_text("\n".join(caplog.handler.format(record) for record in ours))
    assert "out of memory" in (place.home / "serve.log").read_text(), "the traceback is there"
    lines = (place.home / "audit.jsonl").read_text().splitlines()
    assert len(lines) >= 10 and (place.home / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    clean(place, search)
    quoting = [a.status_code for a in answers if a.status_code >= 400 and search.in_bytes(a.content)]
    assert not quoting, "an error that a client's own log may keep quotes its prompt"
