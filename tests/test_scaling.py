"""The arithmetic of docs/scaling.md, the simulation under it, and the example for Kubernetes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture
def zipf(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import zipf

    return zipf


@pytest.mark.parametrize("way", ["any", "home"])
def test_the_simulation_finds_what_the_formula_says(zipf, way):
    shares = zipf.popularity(3000, 1.0)
    hits, _ = zipf.simulate(shares, 4, 40, way, 120_000)
    assert hits == pytest.approx(zipf.expected(shares, 4, 40, way), abs=0.015)


def test_bounded_loads_keep_most_hits_and_the_balance(zipf):
    shares = zipf.popularity(20_000, 1.0)
    found = {way: zipf.simulate(shares, 20, 32, way, 200_000) for way in zipf.WAYS}
    assert found["any"][0] < found["bounded"][0] < found["home"][0]
    assert found["bounded"][1] < 1.2 < 1.5 < found["home"][1]


def test_places_for_all_are_always_hits(zipf):
    shares = zipf.popularity(10, 1.0)
    assert zipf.expected(shares, 1, 10, "any") == 1.0 and zipf.simulate(shares, 1, 10, "any", 2000)[0] == 1.0
    assert zipf.distinct(shares, 1) == pytest.approx(1.0) and zipf.distinct(shares, 10_000) == pytest.approx(10)


@pytest.mark.long
def test_the_document_is_written_between_its_markers(tmp_path):
    doc = tmp_path / "scaling.md"
    doc.write_text("above\n<!-- measured -->\nSTALE\n<!-- /measured -->\nbelow\n")
    command = [sys.executable, ROOT / "benchmarks" / "scaling.py", "--small", "--doc", doc]
    subprocess.run(command, check=True, timeout=120)
    text = doc.read_text()
    assert text.startswith("above") and text.rstrip().endswith("below") and "STALE" not in text
    assert "| 1000 | 1,000,000 | 64,000 | bounded |" in text


def test_the_example_for_kubernetes_agrees_with_the_code():
    from unlearn_peft.adapters.transform.export_vllm import RANKS
    from unlearn_peft.serve.vllm import plugin as vllm_resolver

    kinds = {}
    for part in yaml.safe_load_all((ROOT / "recipes/serve/kubernetes.yaml").read_text()):
        kinds[part["kind"], part["metadata"]["name"]] = part
    container = kinds["StatefulSet", "vllm"]["spec"]["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    ours = [name for name in variables if name.startswith("UNLEARN_PEFT_")]
    assert len(ours) == 4 and all(name in vllm_resolver.__doc__ for name in ours)
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert f"--max-lora-rank={variables['UNLEARN_PEFT_MAX_RANK']}" in container["args"]
    assert int(variables["UNLEARN_PEFT_MAX_RANK"]) in RANKS
    gateway = kinds["Deployment", "gateway"]["spec"]["template"]["spec"]["containers"][0]
    options = [argument.partition("=")[0] for argument in gateway["args"]]
    help_text = subprocess.run(
        [sys.executable, "-m", "unlearn_peft.cli", "serve", "--help"], capture_output=True, text=True, check=True,
        env={"COLUMNS": "200", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
    ).stdout  # fmt: skip
    assert all(option in help_text for option in options)
    assert kinds["NetworkPolicy", "vllm-only-from-gateway"]["spec"]["podSelector"]["matchLabels"] == {"app": "vllm"}
