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
