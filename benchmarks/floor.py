"""The least that a training step can cost: its operations and the bytes that it must move, from the model's shape.

A shape and a step come in; for each way of training, its parts go out, from which performance.py makes seconds. Only
matrix products and attention are counted as operations (a multiply-add is two), exp and other element-wise work is
not; only bytes that no cache can hold are counted: weights, logits, an optimiser's moments.
"""

from dataclasses import dataclass
from typing import NamedTuple

ADAMW = 7 * 4  # bytes a trained number: parameter, gradient and two moments are read, all but the gradient written
SGD = 3 * 4  # parameter and gradient read, parameter written


@dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config):
        """Return the shape of a transformers config, given as a dict."""
        c = config
        head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        return cls(
            c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], head_dim,
            c["intermediate_size"], c["vocab_size"], c["tie_word_embeddings"],
        )  # fmt: skip

    @property
    def linears(self):
        """(in, out) of the seven matrices of a layer: q, k, v, o, gate, up, down."""
        d, q, kv, inner = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.inner
        return [(d, q), (d, kv), (d, kv), (q, d), (d, inner), (d, inner), (inner, d)]

    @property
    def layer(self):
        """Weights of a layer's matrices."""
        return sum(i * o for i, o in self.linears)

    @property
    def head(self):
        """Weights of the output head."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self):
        """Numbers in the model."""
        norms = self.layers * 2 * self.hidden + self.hidden
        return self.layers * self.layer + norms + self.head * (1 if self.tied else 2)

    def adapter(self, kind, r):
        """Numbers in an adapter: B (out, r) and A (r, in) of the head, or of q and v in `layers_of(kind)`."""
        if kind == "head":
            return r * (self.hidden + self.vocabulary)
        q, _, v, *_ = self.linears
        return self.layers_of(kind) * r * (sum(q) + sum(v))

    def layers_of(self, kind):
        """Return how many layers an adapter is on."""
        return {"head": 0, "top8": min(8, self.layers // 2), "lora": self.layers}[kind]


@dataclass(frozen=True)
class Step:
    """What a step works on; half of its tokens are forget rows, half retain rows."""

    tokens: int
    width: int  # tokens a row
    forget_targets: float
    retain_targets: float
    shared: int = 0  # tokens that all rows begin with

    @property
    def targets(self):
        """Tokens that count."""
        return self.forget_targets + self.retain_targets

    @property
    def packed(self):
        """Tokens that are left where those that all rows share are computed once."""
        return self.tokens - (self.tokens // self.width - 1) * self.shared


class Part(NamedTuple):
    """A part of a step, and the name of the rate (rates.py) that its operations run at."""

    name: str
    operations: float
    bytes: float
    rate: str


def parts(way, shape, step, r=8, number=4):
    """Return the parts of a step of one of our ways (`head`, `top8`, `lora`), or of `original` or `full`.

    Args:
        way: which.
        shape: of the model.
        step: what is worked on.
        r: the adapter's rank.
        number: bytes of a weight or a logit.
    """
    if way == "head":
        return head(shape, step, r, number)
    if way in ("original", "full"):
        return two_models(shape, step, way == "full", number)
    return lora(shape, step, way, r, number)


def head(shape, step, r, number):
    """A low-rank delta on the head: the base's logits are known, h A^T B^T is added to them."""
    n, d, v = step.targets, shape.hidden, shape.vocabulary
    return [
        Part("delta forward: h A^T, times B^T", 2 * n * r * (d + v), 0, "thin"),
        Part("delta backward: dB, d(h A^T), dA", 2 * n * r * (v + v + d), 0, "thin"),
        Part("the base's logits, read once", 0, n * v * number, "thin"),
        Part("AdamW", 0, ADAMW * shape.adapter("head", r), "thin"),
    ]


def lora(shape, step, kind, r, number):
    """LoRA on the upper layers: those below give what they gave before; the reference's last states are known."""
    layers, adapter = shape.layers_of(kind), shape.adapter(kind, r)
    body = layers * shape.layer
    back = body - sum(i * o for i, o in shape.linears[:3])  # nobody asks for the gradient of what enters the lowest
    return [
        Part("layers forward", 2 * step.packed * body, body * number, "layer"),
        Part("layers backward, inputs only", 2 * step.packed * back, back * number, "layer"),
        Part("attention forward and backward", 3 * attention(shape, step, layers, step.packed), 0, "layer"),
        Part("LoRA forward and backward", 6 * step.packed * adapter, 0, "layer"),
        Part("head forward and backward", 4 * step.targets * shape.head, 2 * shape.head * number, "head"),
        Part("the reference's logits", 2 * step.retain_targets * shape.head, shape.head * number, "head"),
        Part("AdamW", 0, ADAMW * adapter, "layer"),
    ]


def two_models(shape, step, all_trained, number):
    """Ordinary passes over all rows; the copy runs over the retain rows; the head sees every token."""
    tokens, retain = step.tokens, step.tokens / 2
    body, passes = shape.layers * shape.layer, tokens + retain
    found = [
        Part("layers forward", 2 * passes * body, 3 * body * number, "layer"),
        Part("attention forward", attention(shape, step, shape.layers, passes), 0, "layer"),
        Part("all logits", 2 * passes * shape.head, (3 * shape.head + passes * shape.vocabulary) * number, "head"),
        Part("head backward, weights", 2 * tokens * shape.head, shape.head * number, "head"),
    ]
    if not all_trained:
        return [*found, Part("SGD on the head", 0, SGD * shape.head, "head")]
    return [
        *found,
        Part("head backward, inputs", 2 * tokens * shape.head, shape.head * number, "head"),
        Part("layers backward, weights and inputs", 4 * tokens * body, 2 * body * number, "layer"),
        Part("attention backward", 2 * attention(shape, step, shape.layers, tokens), 0, "layer"),
        Part("AdamW on all parameters", 0, ADAMW * shape.parameters, "layer"),
    ]


def attention(shape, step, layers, tokens):
    """Operations of causal attention, forward: a token meets half of its row, once for scores, once for values."""
    return layers * tokens * 2 * 2 * (step.width / 2) * shape.heads * shape.head_dim


def seconds(found, rates):
    """Return the least time of parts: `rates` has operations/s by name, and bytes/s as `copy`."""
    return sum(part.operations / rates[part.rate] + part.bytes / rates["copy"] for part in found)
