"""A warm process whose forked children do one job each and are killed with -9 at a point of choice.

The parent writes a line of JSON, {"job", "at", "after", "arguments"}; a forked child does the job. `at` kills it just
before its n-th dealing with the file system (Python's audit events), `after` so many seconds after its start. The
answer is {"signal", "code", "events", "seconds", "error"}. Forked from a process that has all imported and the base
loaded, a child costs as much as its job.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "os.truncate",
          "sqlite3.connect", "shutil.rmtree", "os.listdir", "os.scandir", "ctypes.dlsym"}  # fmt: skip
STEPS = 6


class Killer:
    """The warm process, from the test's side."""

    def __init__(self, base_folder, adapters):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, str(base_folder), *map(str, adapters)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, job, *arguments, at=None, after=None):
        ask = {"job": job, "at": at, "after": after, "arguments": list(map(str, arguments))}
        self.process.stdin.write(json.dumps(ask) + "\n")
        return json.loads(self.process.stdout.readline())

    def whole(self, job, *arguments):
        """Do the job to its end; returns its events and seconds."""
        done = self(job, *arguments)
        assert done["code"] == 0, done["error"]
        return done["events"], done["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


# what follows runs in the warm process and its children


def prepare(base_folder, adapters):
    """Load everything, and return the jobs by name."""
    sys.path.insert(0, str(Path(__file__).parent))
    import filelock  # noqa: F401  (with the next: what `pull` imports when it is called, so that children need not)
    import huggingface_hub.utils  # noqa: F401
    from conftest import FORGET, RETAIN

    import unlearn_peft.adapters.hub.pull
    import unlearn_peft.adapters.transform.export_vllm
    from unlearn_peft import load_base, unlearn
    from unlearn_peft.adapters.transform.merge import stack
    from unlearn_peft.files.atomic import atomic_file
    from unlearn_peft.recipe.load import make_recipe
    from unlearn_peft.serve.policy.policy import make_policy
    from unlearn_peft.serve.policy.store import PolicyStore
    from unlearn_peft.serve.policy.yaml_file import dump_policy
    from unlearn_peft.training.examples.build import build_examples
    from unlearn_peft.training.save import save_adapter
    from unlearn_peft.training.trainer import Job, Training

    fields = dict(
        forget=FORGET, retain=RETAIN, objective={"forget_ceiling": 15, "stop_when": None}, anchor_batch=2, steps=STEPS,
        learning_rate=5e-3, eval_every=3, own_answers=0, warmup_steps=0, forget_batch=3, retain_batch=4,
        save_dtype="float32", checkpoint_every=1, cache_gb=0, quiet=True,
    )  # fmt: skip
    unlearn_peft.adapters.hub.download._library()
    base, other = (load_base(base_folder, device="cpu") for _ in range(2))
    trained = {}
    for seed in (0, 1):  # what is saved: kept on a base of its own, learnt in this process
        recipe = make_recipe({**{k: v for k, v in fields.items() if k != "quiet"}, "seed": seed, "steps": 2})
        training = Training(other, [Job(recipe, build_examples({"forget": FORGET, "retain": RETAIN}, other, recipe))])
        training.start()
        training.loop(lambda done, seed=seed, recipe=recipe: trained.update({seed: (done, recipe)}), [])
        other = load_base(base_folder, device="cpu")

    def train(output, seed, resume):
        unlearn(base, **{**fields, "output": output, "seed": int(seed)}, resume=resume == "resume")

    def save(output, seed):
        done, recipe = trained[int(seed)]
        save_adapter(Path(output), done, base, recipe, {"forget": "0"}, b"tests")

    def stack_(output, *strengths):
        stack(adapters, output, [float(strength) for strength in strengths])

    def export(output, *strengths):
        unlearn_peft.adapters.transform.export_vllm.export_vllm(
            adapters, output, [float(strength) for strength in strengths]
        )

    def store(where, name, told):
        """Change a policy, again and again, and note what was confirmed."""
        changes = PolicyStore(where, create=True)
        with open(told, "a", buffering=1) as stream:
            for n in range(10_000):
                stream.write(f"{changes.add(f'{name}-{n}', who=name)}\n")
                stream.write(f"{changes.adapter(f'a-{name}', f'/srv/{n}', None, who=name)}\n")
                stream.write(f"{changes.forget(f'{name}-{n}', f'a-{name}', 1, who=name)}\n")

    def yaml(where, rounds):
        """Replace a policy file, again and again: its tenants are t0, or t0 and t1, and so on."""
        for n in range(int(rounds)):
            tenants = {f"t{m}": {"forget": [], "keys": []} for m in range(1 + n % 40)}
            with atomic_file(Path(where)) as temporary:
                temporary.write_text(dump_policy(make_policy({"adapters": {}, "tenants": tenants}, "tests")))

    def pull(name, output, cache, endpoint):
        os.environ["UNLEARN_PEFT_CACHE"] = cache
        unlearn_peft.adapters.hub.pull.pull(name, output, offline=False, endpoint=endpoint)

    jobs = {"train": train, "save": save, "stack": stack_, "export": export, "store": store, "yaml": yaml, "pull": pull}
    return jobs


def own_lock():
    """Give this process a lock of its own for progress bars: tqdm's is shared with forks, and a killed one keeps it."""
    import threading

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


def run(job, ask, report):
    """In the child: do the job, counting events, and die at the one that was asked for."""
    count = 0

    def hook(event, _):
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == ask["at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    own_lock()
    sys.addaudithook(hook)
    error, code = "", 0
    try:
        job(*ask["arguments"])
    except BaseException:
        error, code = traceback.format_exc(), 1
    os.write(report, json.dumps({"events": count, "error": error, "code": code}).encode())
    os._exit(code)


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what jobs print goes to stderr
    own_lock()
    jobs = prepare(sys.argv[1], sys.argv[2:])
    answers.write("ready\n")
    for line in sys.stdin:
        ask = json.loads(line)
        reading, writing = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if not child:
            run(jobs[ask["job"]], ask, writing)
        os.close(writing)
        if ask["after"] is not None:
            time.sleep(ask["after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as stream:
            told = json.loads(stream.read() or b'{"events": 0, "error": "killed", "code": -9}')
        told |= {"signal": status & 127, "seconds": time.monotonic() - began}
        answers.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
