"""A trained adapter -> its directory: weights, config, manifest, curves and card."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..adapters.bundle import CURVES, WEIGHTS
from ..adapters.card import rows_told, write_card
from ..adapters.write import new_bundle
from ..models.base import DTYPES, Base
from ..recipe.schema import DATA_FIELDS, Recipe
from .checkpoints import to_cpu
from .curves import draw_curves
from .reached import ROW_FIGURES
from .trainer import Trained

logger = logging.getLogger(__name__)


def save_adapter(
    output: Path, trained: Trained, base: Base, recipe: Recipe, digests: Mapping[str, str], key: bytes
) -> None:
    """Write a trained adapter's directory, whole or not at all."""
    from peft import get_peft_model_state_dict

    progress = trained.progress
    config = trained.model.peft_config[trained.name]
    local = Path(base.name).is_dir() and not Path(base.name).is_absolute() and not base.name.startswith((".", "~"))
    name = f"./{base.name}" if local else base.name  # so that it is taken for no Hub id
    config.base_model_name_or_path, config.inference_mode = name, True
    manifest = {
        "base": {"name": name, "fingerprint": base.fingerprint},
        "peft_type": str(config.peft_type.value),
        "recipe": settings_of(recipe),
        "data_digests": {"key": hashlib.sha256(key).hexdigest()[:16], "hmac_sha256": dict(digests)},
        "metrics": metrics_of(trained),
        "history": {"steps": progress.history, "evaluations": progress.evaluations},
        "versions": {name: version(name) for name in ("unlearn-peft", "torch", "transformers", "peft")},
    }
    weights = get_peft_model_state_dict(trained.model, adapter_name=trained.name, save_embedding_layers=False)
    weights = {name: tensor.to(DTYPES[recipe.save_dtype]) for name, tensor in to_cpu(weights).items()}
    with new_bundle(output, manifest) as folder:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
        draw_curves(folder / CURVES, progress.history, progress.evaluations, progress.best_step)
        write_card(folder, manifest)
    metrics = metrics_of(trained)
    logger.log(logging.WARNING if metrics["not_reached"] else logging.INFO, "%s", rows_told(metrics))
    if (
        metrics["forget_loss"] < metrics["forget_loss_base"]
        and metrics["specific_loss"] < metrics["specific_loss_base"]
    ):
        logger.warning("The kept step forgets less than the base: its loss on the forget rows is lower")
    if progress.best_step == 0:
        budget = recipe.objective.retain_budget
        within = "" if budget is None else f" within the retain budget of {budget:g} nats/token"
        logger.warning(
            "Nothing was forgotten: no step forgot more than the base%s, so the adapter changes nothing: use %s",
            within,
            "another learning_rate" if budget is None
            else "a lower learning_rate, a larger retain_weight, or more and nearer retain rows",
        )  # fmt: skip


def metrics_of(trained: Trained) -> dict[str, Any]:
    """Return the manifest's metrics; losses and KL in nats/token."""
    progress = trained.progress
    first, best = progress.evaluations[0], progress.kept
    return {
        "best_step": progress.best_step,
        "scaled_to": progress.scale,  # of that step's delta
        "steps": len(progress.history),
        "forget_batch": trained.forget_batch,
        "evaluated_rows": trained.evaluated_rows,  # of the losses and the probability; the row counts are over all
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
        **{name: progress.rows[name] for name in ROW_FIGURES},
        **{name: best[name] for name in ("held_out_kl", "retain_kl") if name in best},
    }


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe without its data: not even the names of its files, nor refusals that may name what is refused."""
    settings = recipe.model_dump(exclude={*DATA_FIELDS, "output", "cache_gb", "compile"}, mode="json")
    if settings["objective"].pop("refusals", None) and recipe.objective.name == "ga_kl":
        settings["objective"]["refusals"] = True  # in whose words, is not told
    if recipe.makes_retain:
        settings["retain"] = "auto"
    if ".py:" in settings["objective"]["name"]:
        settings["objective"]["name"] = Path(settings["objective"]["name"]).name
    return settings
