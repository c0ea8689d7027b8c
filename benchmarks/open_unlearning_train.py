"""One method of open-unlearning on one set of rows, with its own code; run by open_unlearning.py in its environment.

    python open_unlearning_train.py CHECKOUT SETTINGS.json

The checkout's own trainer, data sets, collator and settings (configs/trainer) are used. Changed is what a CPU and a few
rows ask for: no paged optimiser, no evaluation on the way, float32 weights (theirs are bfloat16), gradients summed over
no batches. Prints a line of JSON.
"""

import gc
import importlib.machinery
import json
import resource
import sys
import time
import types
from pathlib import Path

checkout, settings = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
sys.path.insert(0, str(checkout / "src"))
try:
    import deepspeed  # noqa: F401
except ImportError:  # rmu.py asks whether a model is one of its engines
    stub = types.ModuleType("deepspeed")
    stub.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
    stub.DeepSpeedEngine = type("DeepSpeedEngine", (), {})
    sys.modules["deepspeed"] = stub

from data.collators import DataCollatorForSupervisedDataset  # noqa: E402
from data.qa import QADataset  # noqa: E402
from data.unlearn import ForgetRetainDataset  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from trainer import load_trainer  # noqa: E402
from trainer.utils import seed_everything  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback  # noqa: E402


def config_of(name):
    """Return the settings of a trainer with those of its `defaults` below."""
    own = OmegaConf.load(checkout / "configs" / "trainer" / f"{name}.yaml")
    below = [config_of(parent) for parent in own.pop("defaults", [])]
    return OmegaConf.merge(*below, own)


config = config_of(settings["method"])
for name in ("output_dir", "logging_dir"):
    config.args[name] = settings["output"]
config = OmegaConf.merge(
    config,
    {
        "args": {
            "optim": "adamw_torch", "bf16": settings["bf16"], "bf16_full_eval": False, "use_cpu": True,
            "report_to": "none", "do_eval": False, "eval_on_start": False, "eval_strategy": "no",
            "gradient_accumulation_steps": 1, "disable_tqdm": True, "remove_unused_columns": False, **settings["args"],
        },
        "method_args": settings["method_args"],
    },
)  # fmt: skip
seed_everything(config.args.seed)
folder = Path(settings["model"])  # written by a newer transformers: theirs reads the tokenizer's parts alone
special = json.loads((folder / "tokenizer_config.json").read_text())
special = {name: special[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if special.get(name)}
tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(settings["model"])


def rows(name):
    files = {"path": "json", "data_files": settings[name], "split": "train"}
    return QADataset(files, {"apply_chat_template": True}, tokenizer)


trainer, _ = load_trainer(
    config,
    model=model,
    train_dataset=ForgetRetainDataset(rows("forget"), rows("retain")),
    tokenizer=tokenizer,
    data_collator=DataCollatorForSupervisedDataset(tokenizer),
)


class Counting(TrainerCallback):
    """Counts each step by itself: a counter that goes on keeps the graphs of all steps in memory."""

    flops = 0

    def on_step_begin(self, *args, **kwargs):
        """Begin to count."""
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_step_end(self, *args, **kwargs):
        """Add what the step took."""
        self.counter.__exit__(None, None, None)
        self.flops += self.counter.get_total_flops()
        del self.counter
        gc.collect()


counting = Counting()
trainer.add_callback(counting)
began = time.monotonic()
result = trainer.train()
seconds = time.monotonic() - began
trainer.save_model(settings["output"])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
figures = {"seconds": seconds, "tflop": counting.flops / 1e12, "peak_gb": peak / 1e6}
print(json.dumps({**figures, "steps": result.global_step}))
