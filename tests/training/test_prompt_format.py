"""A recipe's prompt_format goes into the manifest, and from there to whoever asks."""

import pytest

from unlearn_peft import unlearn
from unlearn_peft.adapters.read import read_bundle
from unlearn_peft.cli import options
from unlearn_peft.errors import BaseModelError, RecipeError
from unlearn_peft.recipe.load import make_recipe

FORMAT = "F: {prompt}\nA: {completion}"


def test_it_is_recorded_and_used_again(tiny, tiny_folder, fields):
    seen = []
    tokenizer_call = type(tiny.tokenizer).__call__

    class Spy(type(tiny.tokenizer)):
        def __call__(self, text, **settings):
            seen.append(text)
            return tokenizer_call(self, text, **settings)

    tiny.tokenizer.__class__ = Spy
    adapter = unlearn(tiny, **{**fields, "steps": 2, "prompt_format": FORMAT})
    assert any(str(text).startswith("F: ") for text in seen) and not any("<|im_start|>" in str(text) for text in seen)
    assert tiny.prompt_format is None, "the base is left as it was"
    bundle = read_bundle(adapter)
    assert bundle.prompt_format == FORMAT
    assert options.load(str(tiny_folder), [bundle], "auto", "cpu").prompt_format == FORMAT


def test_a_wrong_format_is_refused_before_any_work(tiny, fields):
    del fields["quiet"]  # no field of a recipe
    for wrong in ({"prompt_format": "{prompt}"}, {"prompt_format": FORMAT, "chat_template": False}):
        with pytest.raises(RecipeError, match="prompt_format|prompt format"):
            make_recipe({**fields, **wrong})
    with pytest.raises(BaseModelError, match="once each"):
        tiny.prompt_format = "{completion}"


def test_a_server_asks_as_its_adapters_were_trained(tmp_path, caplog):
    from unlearn_peft.adapters.bundle import MANIFEST
    from unlearn_peft.cli.serve_policy import prompt_format_of_all
    from unlearn_peft.serve.policy.policy import make_policy

    def asked(**manifests):
        for name, manifest in manifests.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / MANIFEST).write_text(manifest)
        adapters = {name: {"path": str(tmp_path / name)} for name in (*manifests, "elsewhere")}
        return prompt_format_of_all(make_policy({"adapters": adapters, "tenants": {}}, "policy"))

    with_format, without = '{"recipe": {"prompt_format": "F: {prompt}\\nA: {completion}"}}', '{"recipe": {}}'
    assert asked() is None and asked(a=without) is None
    assert asked(a=with_format, b=with_format) == FORMAT
    assert asked(a='{"recipe": {"prompt_format": "{prompt}"}}', b="no JSON") is None and not caplog.records
    assert asked(a=with_format, b=without) is None and "different prompt formats" in caplog.text
