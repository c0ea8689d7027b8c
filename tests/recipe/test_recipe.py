import pytest

from unlearn_peft.errors import RecipeError
from unlearn_peft.recipe.load import load_recipe, make_recipe
from unlearn_peft.training.objectives import find_objective

GOOD = {"forget": ["a"], "retain": ["b"]}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({**GOOD, "retian": 1}, "unknown key 'retian' (did you mean 'retain'?)"),
        ({**GOOD, "objective": {"forget_celing": 3}}, "did you mean 'forget_ceiling'?"),
        ({**GOOD, "adapter": {"kind": "lora", "lora_alhpa": 3}}, "did you mean 'lora_alpha'?"),
        ({**GOOD, "adapter": "lroa"}, "unknown adapter kind 'lroa' (did you mean 'lora'?)"),
        ({**GOOD, "adapter": {"kind": "head", "r": 0}}, "'adapter.r' is 0"),
        ({**GOOD, "objective": "ga_lk"}, "did you mean 'ga_kl'?"),
        ({"retain": ["a"]}, "'forget' is missing"),
        ({**GOOD, "learning_rate": float("nan")}, "learning_rate"),
        ({**GOOD, "steps": 0}, "'steps' is 0"),
        ({**GOOD, "steps": True}, "'steps': true is no number"),
        ({**GOOD, "learning_rate": False}, "'learning_rate': false is no number"),
        ({**GOOD, "adapter": {"kind": "lora", "r": True}}, "'r': true is no number"),
        ({**GOOD, "adapter": {"kind": "lora", "lora_alpha": float("inf")}}, "is no number"),
        ({**GOOD, "objective": {"stop_when": {"forget_loss": True}}}, "'forget_loss': true is no number"),
        ({**GOOD, "objective": {"name": "m:f", "retain_budget": float("inf")}}, "is no number"),
        ({**GOOD, "seed": 10**30}, "is no number up to"),
        ({**GOOD, "seed": 1 << 20_000}, "is no number up to"),
        ({**GOOD, "cache_gb": 1e300}, "is no number up to"),
        ({**GOOD, "output": "a\0b"}, "'output': it is no text"),
        ({**GOOD, "base": "\ud800"}, "'base': it is no text"),
        ({**GOOD, "forget": {"path": "a\0b"}}, "'path': it is no text"),
    ],
)
def test_bad_values_are_named(values, told):
    with pytest.raises(RecipeError) as error:
        make_recipe(values)
    assert told in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(RecipeError) as error:
        make_recipe({"retain": ["b"], "stps": 3, "seed": -1})
    assert all(word in str(error.value) for word in ("forget", "stps", "seed"))


def test_overrides_reach_every_depth_and_shorthand(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("forget: f.jsonl\nretain: sub/r.csv\nadapter: lora\nlearning_rate: 2e-4\n")
    sets = ["adapter.r=3", "objective.stop_when.forget_loss=2.5", "retain=other.jsonl", "seed=7"]
    recipe = load_recipe(path, sets, output="o")
    assert recipe.forget.path == str(tmp_path / "f.jsonl")  # in the recipe: relative to the recipe
    assert recipe.retain.path == "other.jsonl"  # on the command line: relative to the working folder
    assert (recipe.adapter.r, recipe.objective.stop_when.forget_loss, recipe.seed) == (3, 2.5, 7)
    assert (recipe.learning_rate, recipe.output) == (2e-4, "o")


def test_the_parts_of_a_data_set_are_overridden_as_those_of_an_adapter(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("forget: f.jsonl\nretain: [x]\n")
    recipe = load_recipe(path, ["forget=qa.csv", "forget.columns.prompt=question", "forget.columns.completion=answer"])
    assert recipe.forget.model_dump(exclude_unset=True) == {
        "path": "qa.csv", "columns": {"prompt": "question", "completion": "answer"}
    }  # fmt: skip
    assert load_recipe(path, ["forget.split=test"]).forget.path == str(tmp_path / "f.jsonl")
    with pytest.raises(RecipeError, match="'retain' holds a list, not named settings"):
        load_recipe(path, ["retain.columns.prompt=x"])


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "r.yaml"
    path.write_text(
        "base: ~/b\nforget: ~/f.jsonl\nretain: {path: ~/r}\noutput: ~/o\nobjective: ~/mine.py:f\n"
        "probes: ~no_such_user/p.csv\n"
    )
    recipe = load_recipe(path, ["neighbours=~/n.csv"])
    home = str(tmp_path / "home")
    places = recipe.forget.path, recipe.retain.path, recipe.neighbours.path, recipe.output, recipe.objective.name
    assert places == (f"{home}/f.jsonl", f"{home}/r", f"{home}/n.csv", f"{home}/o", f"{home}/mine.py:f")
    assert recipe.probes.path.endswith("~no_such_user/p.csv")  # no home: as it is written
    assert make_recipe({**GOOD, "output": "~/o"}).output == f"{home}/o"


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", ""])
def test_unreadable_recipes(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "r.yaml")


def test_any_lora_field_passes_through():
    recipe = make_recipe({**GOOD, "adapter": {"kind": "lora", "use_rslora": True, "layers_to_transform": [0]}})
    assert recipe.adapter.model_extra == {"use_rslora": True, "layers_to_transform": [0]}


def test_shipped_recipes_are_valid():
    from pathlib import Path

    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        load_recipe(path)
    custom = find_objective(str(recipes[0].parent / "custom_objective.py") + ":unlikelihood")
    assert custom.__name__ == "unlikelihood"
    with pytest.raises(RecipeError, match="cannot load the objective"):
        find_objective("no_such_module:loss")
