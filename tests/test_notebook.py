"""docs/original_experiment.ipynb runs, on a tiny model and (slow) on the demo's; its settings are the recipe's."""

import ast
import re
from pathlib import Path

import pytest

from unlearn_peft import load_recipe
from unlearn_peft.recipe.load import make_recipe

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "original_experiment.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def executed(notebook, folder, **parameters):
    """Execute the notebook in a folder, with other values for these names of the cell tagged `parameters`."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in parameters.items():
        cell.source, count = re.subn(rf"^{name} = .*", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert count == 1
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return printed(notebook), pictures(notebook)


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.long
def test_it_runs_on_a_tiny_model(notebook, tiny_folder, tmp_path):
    text, images = executed(notebook, tmp_path, BASE=str(tiny_folder), STEPS=20)
    assert "logits bit-equal after removal: True" in text and len(images) == 1
    assert re.search(r"forget loss [\d.]+ -> [\d.]+ nats/token", text)


@pytest.mark.slow
def test_it_runs_on_the_demo_and_forgets(notebook, smol, tmp_path):
    text, _ = executed(notebook, tmp_path)
    before, after = map(float, re.search(r"forget loss ([\d.]+) -> ([\d.]+)", text).groups())
    assert after > 1.4 * before and "logits bit-equal after removal: True" in text


def test_it_was_saved_with_the_outputs_of_one_execution(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "logits bit-equal after removal: True" in printed(notebook) and len(pictures(notebook)) == 1


def test_its_settings_are_the_recipes(notebook):
    cells = [cell.source for cell in notebook.cells if "unlearn(" in cell.source or cell.metadata.get("tags")]
    names, source = {}, "\n".join(cells)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names[node.targets[0].id] = node.value.value
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "unlearn":
            given = {k.arg: eval(compile(ast.Expression(k.value), "", "eval"), dict(names)) for k in node.keywords
                     if k.arg not in ("output", "quiet")}  # fmt: skip
    ours, theirs = make_recipe(given), load_recipe(ROOT / "recipes" / "seed_lm_head.yaml", output=None)
    assert ours.model_dump(exclude={"output"}) == theirs.model_dump(exclude={"output"})
