"""One recipe from its rows to a finished adapter directory: read, check, train, describe, save."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from .auto_retain import Made, auto_retain
from .bank import attached
from .base import DTYPES, Base, load_base
from .bundle import CONFIG, WEIGHTS, check_output, new_bundle
from .card import CURVES, draw_curves, write_card
from .checkpoints import Checkpoints
from .data import Example, Row, anchors, keyed_digest, read_rows, refuse_overlap, tokenize
from .errors import AdapterError, DataError, OutputError
from .files import folder_bytes, whole_file
from .own_answers import own_answers, questions
from .recipe import DATA_FIELDS, Recipe, make_recipe
from .refusals import refusing
from .schedule import Sets, split_retain
from .specific import common_words, facts_of, mark_facts, mark_specific
from .train import Progress, Trained, run_digest, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """A finished adapter: where it lies, how large it is, and what its training saw."""

    path: Path
    bytes: int
    metrics: dict[str, Any]
    progress: Progress

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def unlearn(
    base: str | Base | None = None,
    *,
    recipe: Recipe | None = None,
    resume: bool = False,
    tracker: str | None = None,
    quiet: bool = False,
    **fields: Any,
) -> Adapter:
    """Train a forget adapter and save it; the base is left as it was, to the last bit.

    Args:
        base: a loaded `Base`, or a name as `load_base` takes it; by default the recipe's.
        recipe: all settings at once, see `load_recipe`; or give
        fields: a recipe's fields by name: `forget`, `retain` (rows or paths), `output`, `steps`, ...
        resume: go on from the newest checkpoint beside the output, if there is one.
        tracker: an Accelerate tracker: tensorboard, trackio or wandb.
        quiet: no progress bar.

    Raises:
        UnlearnError: see errors.py; nothing is written over that was there before.
    """
    if recipe is None:
        recipe = make_recipe({**fields, **({"base": base} if isinstance(base, str) else {})}, origin="unlearn(...)")
    elif fields:
        recipe = make_recipe({**recipe.model_dump(exclude_unset=True), **fields}, origin="unlearn(...)")
    output = Path(recipe.output or "out/adapter")
    check_output(output)
    rows = read_sets(recipe)
    live = base if isinstance(base, Base) else load_base(base or recipe.base, recipe.dtype, recipe.device)
    if held := attached(live):
        raise AdapterError(f"attached to the base: {', '.join(held)}. Detach first: the bare base is the reference")
    if recipe.makes_retain:
        made = make_retain(rows, live, recipe)
        rows["retain"] = made.rows
        logger.info("%s", made.line())
    main = int(os.environ.get("RANK", 0)) == 0
    sets = tokenized(rows, live, recipe, quiet=quiet or not main)
    data_key = _digest_key()
    digests = {name: keyed_digest(part, data_key) for name, part in rows.items()}
    checkpoints = Checkpoints(output, run_digest(recipe, str(sorted(digests.items())), live))
    lock = FileLock(output.with_name(output.name + ".lock")) if main else None
    try:
        if lock:
            output.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            if not resume and (aside := checkpoints.put_aside()):
                logger.warning("An unfinished run was put aside in %s (--resume would have gone on with it)", aside)
        trained = train(live, recipe, sets, checkpoints=checkpoints, resume=resume, tracker=tracker, quiet=quiet)
        try:
            if trained.is_main:
                _save(output, trained, live, recipe, digests, data_key)
                checkpoints.clear()
        finally:
            trained.model.unload()
            live.model.__dict__.pop("peft_config", None)
    except Timeout:
        raise OutputError(f"another run is writing to {output}: wait for it, or choose another --output") from None
    except PermissionError as error:
        raise OutputError(
            f"cannot write {output} ({error.strerror}): choose a folder that this user may write to"
        ) from None
    finally:
        if lock:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
    return Adapter(output, folder_bytes(output) if output.is_dir() else 0, _metrics(trained), trained.progress)


def read_sets(recipe: Recipe) -> dict[str, list[Row]]:
    """Read all row sets that the recipe names, and refuse those that contradict each other."""
    named = {name: source for name in DATA_FIELDS if (source := getattr(recipe, name)) not in (None, "auto")}
    rows = {name: read_rows(source, name) for name, source in named.items()}
    if "forget" not in rows:
        raise DataError("the forget set is missing: expected a file or rows to forget")
    refuse_overlap(rows["forget"], rows.get("retain", []))
    return rows


def make_retain(rows: Mapping[str, list[Row]], base: Base, recipe: Recipe) -> Made:
    """Make the retain set of a recipe that names none, from the row sets that it does name.

    Raises:
        DataError: if nothing is left that shares no name with the forget set.
    """
    never = [row for name in ("probes", "neighbours") for row in rows.get(name, [])]
    made = auto_retain(
        base, rows["forget"], recipe.seed, key=_digest_key(), never=never, chat_template=recipe.chat_template
    )
    if not made.rows:
        raise DataError(f"no retain set could be made ({made.line()}): name one with `retain`, or set retain_weight: 0")
    refuse_overlap(rows["forget"], made.rows)
    return made


def tokenized(rows: Mapping[str, list[Row]], base: Base, recipe: Recipe, *, quiet: bool = True) -> Sets:
    """Turn a recipe's rows into what is trained on: facts marked, the base's own answers and anchors beside them."""

    def tokens(rows: Sequence[Row], what: str) -> list[Example]:
        return tokenize(
            rows, base.tokenizer, max_length=recipe.max_length, train_on=recipe.train_on,
            chat_template=recipe.chat_template, closing=what != "forget", what=what,
        )  # fmt: skip

    def with_refusals(examples: list[Example], shown: Sequence[Row]) -> list[Example]:
        wanted = getattr(recipe.objective, "refusals", False)  # any objective's, a user's own too
        if wanted is False:
            return examples
        refused = refusing(shown, recipe.seed, wanted if isinstance(wanted, list) else None)
        return [
            replace(example, refusal=tokens([row], "refusal")[0]) if row else example
            for example, row in zip(examples, refused, strict=True)
        ]

    wide: list[Row] = []
    if recipe.anchor_batch and recipe.retain_weight:
        wide = anchors(rows["forget"], *(rows.get(name, []) for name in ("retain", "probes", "neighbours")))
    retain, held_out = split_retain(tokens(rows.get("retain", []), "retain"), recipe)
    held = tokens(wide, "anchor")
    common = common_words([*retain, *held_out, *held])
    bare = tokens(rows["forget"], "forget")
    facts = facts_of(bare, common)
    forget = mark_specific(bare, facts)
    own: list[Example] = []
    if recipe.own_answers and getattr(recipe.objective, "forget_tokens", "all") == "specific":
        asked = questions(rows["forget"], facts, common | common_words([*retain, *held_out, *held], of_prompts=True))
        said = own_answers(
            base, asked, facts, recipe.own_answers, seed=recipe.seed, chat=recipe.chat_template, quiet=quiet
        )
        own = mark_facts(with_refusals(tokens(said, "forget"), said), facts)
    return Sets(with_refusals(forget, rows["forget"]), retain, held_out, held, own)


def _save(output: Path, trained: Trained, base: Base, recipe: Recipe, digests: Mapping[str, str], key: bytes) -> None:
    progress = trained.progress
    config = trained.model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base.name, True
    manifest = {
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "peft_type": str(config.peft_type.value),
        "recipe": _settings(recipe),
        "data_digests": {"key": hashlib.sha256(key).hexdigest()[:16], "hmac_sha256": dict(digests)},
        "metrics": _metrics(trained),
        "history": {"steps": progress.history, "evaluations": progress.evaluations},
        "versions": {name: version(name) for name in ("unlearn-peft", "torch", "transformers", "peft")},
    }
    with new_bundle(output, manifest) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of the tied head, which save_embedding_layers=False settles
            trained.model.save_pretrained(folder, save_embedding_layers=False)
        for file in folder.iterdir():
            if file.name not in (WEIGHTS, CONFIG):
                file.unlink()
        kept = {name: tensor.to(DTYPES[recipe.save_dtype]) for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
        draw_curves(folder / CURVES, progress.history, progress.evaluations, progress.best_step)
        write_card(folder, manifest)
    if progress.best_step == 0:
        logger.warning(
            "No step stayed within the retain budget of %g nats/token, so the adapter changes nothing: use a lower "
            "learning_rate, a larger retain_weight, or more and nearer retain rows",
            recipe.objective.retain_budget,
        )


def _metrics(trained: Trained) -> dict[str, Any]:
    progress = trained.progress
    first, best = (
        progress.evaluations[0],
        next(e for e in progress.evaluations if e["step"] == progress.best_step),
    )
    metrics = {
        "best_step": progress.best_step,
        "stopped_by": progress.stopped_by,
        "within_budget": progress.best_step > 0,
        "forget_loss_base": first["forget_set_loss"],
        "forget_loss": best["forget_set_loss"],
        "specific_loss_base": first["specific_loss"],
        "specific_loss": best["specific_loss"],
        "forget_loss_change_percent": 100 * (best["forget_set_loss"] / max(first["forget_set_loss"], 1e-9) - 1),
        "answer_probability_base": first["answer_probability"],
        "answer_probability": best["answer_probability"],
        "training_seconds": round(trained.seconds, 1),
    }
    for name in ("held_out_kl", "retain_kl"):
        if name in best:
            metrics[name] = best[name]
    return metrics


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe without its data: not even the names of its files, nor refusals that may name what is refused."""
    settings = recipe.model_dump(exclude={*DATA_FIELDS, "output"}, mode="json")
    settings["objective"].pop("refusals", None)
    if recipe.makes_retain:
        settings["retain"] = "auto"
    if ".py:" in settings["objective"]["name"]:
        settings["objective"]["name"] = Path(settings["objective"]["name"]).name
    return settings


def _digest_key() -> bytes:
    """Return this user's secret for keyed digests: `$UNLEARN_PEFT_DIGEST_KEY`, else a file made on first use."""
    if given := os.environ.get("UNLEARN_PEFT_DIGEST_KEY"):
        return given.encode()
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = home / "unlearn_peft" / "digest.key"
    if not path.is_file():
        with whole_file(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(secrets.token_hex(32))
    return path.read_text().encode()
