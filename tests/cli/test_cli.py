"""The command line as a user meets it: exit codes, one clear error, JSON for machines."""

import json
import subprocess
import sys

import pytest
from commands import cli
from conftest import FORGET, RETAIN


@pytest.fixture
def recipe(tmp_path, tiny_folder, write_rows):
    write_rows("forget.jsonl", FORGET)
    write_rows("retain.jsonl", RETAIN)
    values = {"base": str(tiny_folder), "forget": "forget.jsonl", "retain": "retain.jsonl", "steps": 4, "device": "cpu",
              "objective": {"forget_ceiling": 15, "stop_when": None, "retain_budget": None}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return tmp_path / "recipe.yaml"


def test_train_generate_compare_inspect_stack_merge(recipe, tmp_path, tiny_folder, write_rows):
    for name in ("a", "b"):
        done = cli("train", recipe, "--set", f"seed={ord(name)}", "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "forget loss" in done.stdout and "MB)" in done.stdout and "forgetting: 100%" in done.stderr
    stacked = cli("stack", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "ab")
    assert stacked.returncode == 0, stacked.stderr
    asked = ["--prompt", "Who wrote?", "--prompt", "What?", "--max-new-tokens", "4", "--json"]
    alone = cli("generate", "--base", tiny_folder, *asked)
    assert alone.returncode == 0, alone.stderr
    lines = [json.loads(line) for line in alone.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["Who wrote?", "What?"]
    assert all(line.keys() == {"prompt", "text", "adapters"} and line["adapters"] == [] for line in lines)
    both = cli("generate", "--base", tiny_folder, "--adapter", tmp_path / "a", "--adapter", tmp_path / "b", *asked)
    assert json.loads(both.stdout.splitlines()[0])["adapters"] == ["a", "b"], both.stderr
    probes = write_rows("probes.jsonl", [{"prompt": "Who?", "leak": ["Zorblax"]}])
    near = write_rows("near.jsonl", RETAIN[:2])
    seen = cli("compare", tmp_path / "a", "--base", tiny_folder, "--probes", probes, "--neighbours", near, "--json")
    result = json.loads(seen.stdout)
    assert result["neighbour_kl"]["with"] > 0 == result["neighbour_kl"]["after"]
    assert result["probes"][0]["before"] == result["probes"][0]["after"]
    shown = cli("compare", tmp_path / "a", "--base", tiny_folder, "--probes", probes)
    assert "after removal" in shown.stdout, shown.stderr
    facts = json.loads(cli("inspect", tmp_path / "ab", "--json").stdout)
    assert facts["peft_type"] == "LORA" and facts["ranks"] == [16]
    merged = cli("merge", tmp_path / "a", "--base", tiny_folder, "--output", tmp_path / "merged")
    assert merged.returncode == 0 and (tmp_path / "merged" / "config.json").is_file(), merged.stderr


def refused(done, *told):
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr and sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    for words in told:
        assert words in done.stderr, done.stderr


def test_wrong_recipes_and_data(recipe, tmp_path, write_rows):
    refused(cli("train", tmp_path / "none.yaml"), "no recipe at")
    refused(cli("train", recipe, "--set", "stpes=3"), "did you mean 'steps'?")
    refused(cli("train", recipe, "--set", "adapter.r=0"), "'adapter.r' is 0")
    refused(cli("train", recipe, "--set", "forget=nowhere.jsonl"), "no forget set at")
    refused(cli("train", recipe, "--set", f"forget={write_rows('e.jsonl', [])}"), "is empty")
    refused(cli("train", recipe, "--set", f"retain={tmp_path / 'forget.jsonl'}"), "overlap")
    refused(cli("train", recipe, "--set", "adapter.target_modules=[foo]"), "unknown target modules: foo", "q_proj")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("x")
    refused(cli("train", recipe, "--output", tmp_path / "full"), "holds something else", "x.txt")


def test_wrong_bases_and_adapters(recipe, tmp_path, tiny_folder):
    refused(cli("generate", "--base", "/no/such/model", "--prompt", "x"), "no base model at")
    refused(
        cli("generate", "--base", "nobody/nothing", "--prompt", "x", HF_HUB_OFFLINE="1"), "network", "nobody/nothing"
    )
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    done = cli("generate", "--base", tmp_path / "bad.gguf", "--prompt", "x", UNLEARN_PEFT_CACHE=str(tmp_path / "cache"))
    refused(done, "cannot read", "GGUF")
    assert not list((tmp_path / "cache").glob("*")), "nothing half converted is left"
    refused(cli("generate", "--base", tiny_folder, "--adapter", tmp_path / "none", "--prompt", "x"), "no adapter at")
    refused(cli("generate", "--base", tiny_folder, "--device", "warp", "--prompt", "x"), "cannot use the device 'warp'")
    refused(cli("compare", tmp_path / "none"), "nothing to compare")


def test_help_names_every_command():
    command = [sys.executable, "-m", "unlearn_peft.cli"]  # a process as users start it, nothing imported beforehand
    out = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    commands = out.partition("Commands:")[2]
    listed = [line.split()[0] for line in commands.splitlines() if line.strip()]
    verbs = ("train", "retain", "generate", "compare", "eval", "inspect", "stack", "merge")
    assert [verb for verb in listed if verb in verbs] == list(verbs)
    assert "..." not in commands, "a command's first sentence is cut"
    assert subprocess.run([*command, "--no-such"], capture_output=True).returncode == 2


def test_no_help_loses_what_stands_in_brackets():
    """Help is plain text: were it markup, `unlearn-peft[serve]` would come out as `unlearn-peft`."""
    out = subprocess.run([sys.executable, "-m", "unlearn_peft.cli", "eval", "--help"], capture_output=True, text=True)
    assert "unlearn-peft[lm-eval]" in "".join(out.stdout.split())


def test_help_is_printed_without_rich():
    code = "import sys; from unlearn_peft.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "typer" in out.split() and "rich" not in out.split()
