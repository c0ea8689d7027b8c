"""What would a step need on one H100, for models that this machine is too small for? Arithmetic, nothing is measured.

Shapes as in the models' own config.json; operations and bytes as in floor.py, here with bfloat16 weights and logits.
Memory: weights, what is trained with its moments, what is kept for each row, activations, logits.
"""

from floor import Shape, Step, parts, seconds

MODELS = {
    "TinyLlama-1.1B": Shape(2048, 22, 32, 4, 64, 5632, 32000, tied=False),
    "Llama-3.1-8B": Shape(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
}
OPERATIONS, BANDWIDTH = 989e12, 3.35e12  # a second, dense bfloat16, and bytes a second: NVIDIA's H100 SXM data sheet
USED, STREAMED = 0.4, 0.8  # of them, assumed; launching kernels is not counted, and rules where a step is a millisecond
THIN = 0.05  # used of the operations where the inner size is the rank, assumed
STEP = Step(tokens=16 * 256, width=256, forget_targets=8 * 128, retain_targets=8 * 128)
ROWS = 400  # of the data set, forget and retain together, for what is kept
CHUNK = 1024  # target tokens whose logits are held at once
HALF, FULL = 2, 4  # bytes of a bfloat16 and a float32 number
WAYS = ("head", "top8", "lora", "original", "full")


def projections():
    """Return (model, way, seconds a step, {what: bytes}) for each model and way."""
    rates = {"layer": USED * OPERATIONS, "head": USED * OPERATIONS, "thin": THIN * OPERATIONS,
             "copy": STREAMED * BANDWIDTH}  # fmt: skip
    return [
        (name, way, seconds(parts(way, shape, STEP, number=HALF), rates), memory(way, shape))
        for name, shape in MODELS.items()
        for way in WAYS
    ]


def memory(way, shape, step=STEP, r=8):
    """Return the bytes that a step needs, by what they are for."""
    p, v = shape.parameters, shape.vocabulary
    if way == "original":
        return {
            "weights": (2 * p + shape.head) * HALF,
            "trained": shape.head * HALF,  # its gradient
            "kept rows": 0,
            "activations": step.tokens * shape.hidden * HALF,
            "logits": logits(step.tokens * 3 / 2, v),
        }
    if way == "full":
        return {
            "weights": 2 * p * HALF,
            "trained": p * (HALF + 2 * FULL),  # gradient, two moments
            "kept rows": 0,
            "activations": step.tokens * shape.layers * saved(shape) * HALF,
            "logits": logits(step.tokens * 3 / 2, v),
        }
    layers, targets = shape.layers_of(way), ROWS * step.targets / (step.tokens / step.width)
    last_states = targets * shape.hidden
    below = {"head": targets * v, "top8": ROWS * step.width * shape.hidden, "lora": 0}[way]
    return {
        "weights": p * HALF,
        "trained": shape.adapter(way, r) * 4 * FULL,  # the adapter, gradient, two moments
        "kept rows": (last_states + below) * HALF,
        "activations": step.packed * layers * saved(shape) * HALF,
        "logits": logits(min(CHUNK, step.targets), v),
    }


def logits(tokens, vocabulary):
    """Bytes of logits, their log-softmax and its gradient, in float32, and of the logits as the model gives them."""
    return tokens * vocabulary * (3 * FULL + HALF)


def saved(shape):
    """Numbers a token that a layer keeps for its backward pass, about: no scores (flash attention), no recomputing."""
    d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return 6 * d + 2 * q + 2 * kv + 4 * shape.inner
