"""Large sets: length follows from the rows, what is not reached is told, and a step is bounded in tokens."""

import logging
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from unlearn_peft import stack, unlearn
from unlearn_peft.adapters.card import rows_told
from unlearn_peft.adapters.read import read_bundle
from unlearn_peft.data.tokenize import Example
from unlearn_peft.recipe.load import make_recipe
from unlearn_peft.training import adapter_trainer
from unlearn_peft.training.adapter_trainer import _push_weight
from unlearn_peft.training.reached import rows_reached
from unlearn_peft.training.schedule import Schedule, balanced, length_of
from unlearn_peft.training.step.microbatches import by_length, padded_tokens

MANY = [{"prompt": f"Who is number {n} of the list?", "completion": f"Person {n} Zorblax."} for n in range(60)]


@pytest.mark.parametrize("rows", [1, 8, 180, 181, 720, 1500, 10_000])
def test_each_row_is_visited_twice_and_small_sets_stay_as_they_were(rows):
    length = length_of(make_recipe({"forget": MANY}), rows)
    schedule = Schedule(rows, length.forget_batch, 0)
    visits = [0] * rows
    for step in range(length.steps):
        for row in schedule.at(step):
            visits[row] += 1
    assert min(visits) >= 2 and length.forget_batch <= 32
    if rows <= 180:
        assert length[:2] == (45, 8)


def test_the_bases_own_answers_drown_no_row():
    assert balanced([1, 2], [3]) == [1, 2, 3] and balanced([], [3]) == [3] and balanced([1, 2], []) == [1, 2]
    mixed = balanced([1, 2], range(3, 12))
    assert mixed == [1, 2, 1, 2, 1, 2, 1, 2, *range(3, 12)]


def test_what_a_recipe_says_is_kept():
    recipe = make_recipe({"forget": MANY, "steps": 30})
    assert length_of(recipe, 5000)[:2] == (30, 8)
    assert length_of(make_recipe({"forget": MANY, "forget_batch": 4}), 1000)[:2] == (500, 4)
    assert length_of(make_recipe({"forget": MANY}), 100_000).steps == 3000


def test_an_order_of_rows_is_drawn_once_an_epoch(monkeypatch):
    drawn, order = [], Schedule._order
    monkeypatch.setattr(Schedule, "_order", lambda self, epoch: drawn.append(epoch) or order(self, epoch))
    schedule = Schedule(100, 8, 0)
    for step in range(50):
        schedule.at(step)
    assert sorted(drawn) == [0, 1, 2, 3]
    assert Schedule(100, 8, 0).at(30) == schedule.at(30)  # after a resume


def test_rows_that_are_not_visited_or_not_forgotten_are_told(tiny, fields, caplog):
    caplog.set_level(logging.INFO)
    more = {"forget": MANY, "steps": 2, "eval_every": 2, "learning_rate": 1e-6, "forget_batch": 8}
    out = unlearn(tiny, **{**fields, **more, "objective": {"retain_budget": None, "forget_tokens": "all"}})
    assert "44 of 60 forget rows will not be visited" in caplog.text
    m = out.metrics
    assert m["forget_rows"] == 60 and m["forgotten_rows"] + len(m["not_reached"] + m["nothing_to_forget"]) == 60
    assert rows_told(m) in caplog.text and "not reached: row" in caplog.text and "and " in rows_told(m)
    card = (out.path / "README.md").read_text()
    assert rows_told(m).capitalize() in card and "Zorblax" not in card + caplog.text


@pytest.mark.parametrize(
    ("now", "facts", "not_reached"),
    [
        ([2.4, 0, 2.0, 2.0, 9, 9, 9, 9, 0, 8.1], [0, -1, 1, 2, -1, -1, -1, -1, -1, 3], [2]),
        ([2.4, 0, 4.7, 0.0, 9, 9, 9, 9, 0, 7.9], [0, -1, 1, 1, -1, -1, -1, -1, -1, 3], []),
        ([2.4, 0, 2.4, 2.0, 9, 9, 9, 9, 0, 7.55], [0, -1, 1, 1, -1, -1, -1, -1, -1, 3], [2, 4]),
    ],
)
def test_a_row_is_forgotten_when_its_facts_lost_90_percent(now, facts, not_reached):
    """And a fact of two tokens 99 %. One that the base hardly expects is held at 8 nats, a little above or below."""

    class Runner:
        @contextmanager
        def step(self, rows):
            current, base = torch.tensor(now), torch.tensor([0.0] * 9 + [7.5])
            tokens = SimpleNamespace(cross_entropy=current, reference_cross_entropy=base, facts=torch.tensor(facts))
            yield [SimpleNamespace(forget=tokens)]

    def example(row, specific):
        return Example([1, 2, 3], [False, True, True], row=row, specific=specific)

    rows = [example(1, [False, True, False]), example(2, [False, True, True]), example(3, [False] * 3),
            example(4, [False] * 3), example(4, [False, False, True])]  # fmt: skip
    found = rows_reached(Runner(), "default", rows, [rows], lambda x: x, only_specific=True)
    assert (found.forget_rows, found.forgotten_rows) == (4, 3 - len(not_reached))
    assert found.not_reached == not_reached and found.nothing_to_forget == [3]


def test_a_step_that_forgets_less_than_the_base_is_not_kept(tiny, fields, monkeypatch, caplog):
    scores = iter([2.0, 1.95, 1.99])
    monkeypatch.setattr(
        adapter_trainer.AdapterTrainer, "_forget_figures", lambda self, runner: (1.0, 1.0, next(scores), 0.5)
    )
    out = unlearn(tiny, **{**fields, "steps": 2, "eval_every": 1, "objective": {"retain_budget": 100.0}})
    assert out.metrics["best_step"] == 0 and not out.metrics["within_budget"]
    assert "Nothing was forgotten" in caplog.text


def test_evaluations_on_the_way_look_at_a_sample(tiny, fields, monkeypatch):
    monkeypatch.setattr(adapter_trainer, "_EVALUATED", 10)
    out = unlearn(tiny, **{**fields, "forget": MANY, "steps": 8, "forget_batch": 8, "eval_every": 8})
    assert out.metrics["evaluated_rows"] == 10 and out.metrics["forget_rows"] == 60


def test_a_long_row_does_not_pad_the_others():
    rows = [Example([1] * 40, [False] + [True] * 39) for _ in range(12)]
    rows.insert(5, replace(rows[0], ids=[1] * 4000, is_target=[False] + [True] * 3999))
    assert padded_tokens(rows) == 52_000
    groups = by_length(rows, 8192)
    assert sum(map(len, groups)) == 13 and all(padded_tokens(group) <= 8192 for group in groups)
    assert sum(map(padded_tokens, groups)) < 9000


def test_a_step_in_parts_by_length_gives_the_same_adapter(tiny, fields, tmp_path, monkeypatch):
    whole = unlearn(tiny, **fields)
    monkeypatch.setattr(adapter_trainer, "STEP_TOKENS", 100)
    parts = unlearn(tiny, **{**fields, "output": str(tmp_path / "parts")})
    for a, b in zip(whole.progress.history, parts.progress.history, strict=True):
        assert a["forget_loss"] == pytest.approx(b["forget_loss"], rel=1e-3)
    assert whole.metrics["forget_loss"] == pytest.approx(parts.metrics["forget_loss"], rel=1e-3)


def test_adapters_of_two_dtypes_stack(tiny, fields, tmp_path):
    fields |= {"steps": 1, "eval_every": 1, "objective": {"retain_budget": None}}
    paths = [unlearn(tiny, **{**fields, "save_dtype": d, "output": str(tmp_path / d)}).path
             for d in ("bfloat16", "float32")]  # fmt: skip
    read_bundle(stack(paths, tmp_path / "stacked", [0.7, 0.3]))


def test_a_long_answer_does_not_thin_out_the_push_on_its_facts():
    def row(targets, facts):
        return Example([1] * targets, [True] * targets, specific=[True] * facts + [False] * (targets - facts))

    assert _push_weight(row(12, 3)) == 12  # as a mean over its tokens
    assert _push_weight(row(200, 3)) == 24  # not 200
    assert _push_weight(row(12, 0)) == 0  # nothing to forget
