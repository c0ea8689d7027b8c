"""How much of the rows the model still knows: by probability, by greedy decoding, by ROUGE-L of its answers.

Per-token numbers (`RowTokens`) or texts come in; one number a row goes out, as a numpy array.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...data.rows import question_answer_pairs
from ...data.source import Row
from ...data.words import words_in
from ...inference.generate import answers
from ...models.base import Base
from ..score import Array, extra
from ..token_scores import RowTokens

_ANSWER_END = re.compile(r"\n\n|\nQuestion|Question:")  # where MUSE cuts an answer off


def answer_probability(tokens: Sequence[RowTokens]) -> Array:
    """Return `P(answer | question)^(1/|answer|)` of each row: the geometric mean of its tokens' probabilities.

    TOFU (Maini et al. 2024, arXiv:2401.06121); as in its code and open-unlearning's, the end-of-turn
    marker is a part of the answer (where a row has one).
    """
    return np.exp([-row.loss for row in tokens])


def exact_memorization(tokens: Sequence[RowTokens]) -> Array:
    """Return the share of each row's answer tokens that are the model's first choice, given those before.

    Tirumala et al. 2022 (arXiv:2205.10770); the end-of-turn marker is left out, as in open-unlearning.
    """
    return np.array([float(row.answer(row.greedy).double().mean()) for row in tokens])


def extraction_strength(tokens: Sequence[RowTokens]) -> Array:
    """Return 1 - k/n of each row, k the smallest number of answer tokens after which greedy decoding gives the rest.

    Carlini et al. 2021 (arXiv:2012.07805), as a strength in Wang et al. 2025 (ICLR, "Towards effective evaluations
    and comparisons for LLM unlearning methods"). A row whose last token does not follow even after all others has k = n
    and strength 0 by this definition; open-unlearning's code gives 1/n. The end-of-turn marker is left out, as there.
    """
    strengths = []
    for row in tokens:
        wrong = np.flatnonzero(~row.answer(row.greedy).numpy())
        n = len(row.answer(row.greedy))
        strengths.append(1 - (int(wrong[-1]) + 1 if len(wrong) else 0) / n)
    return np.array(strengths)


def rouge_l(
    expected: Sequence[str], texts: Sequence[str], *, part: Literal["recall", "fmeasure"] = "recall", stem: bool = True
) -> Array:
    """Return the ROUGE-L (Lin 2004) of each text, by the library rouge-score.

    TOFU takes the recall, with stemming; MUSE the F-measure, without. The library by itself sees a to z and 0 to 9
    alone; words of other letters are added to those here, so that only texts of ASCII have its own values. In a
    script without spaces each letter counts as a word.

    Raises:
        UnlearnError: if rouge-score is not installed.
    """
    scorer = extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words(stem))
    pairs = zip(expected, texts, strict=True)
    return np.array([getattr(scorer.score(gold, text)["rougeL"], part) for gold, text in pairs], dtype=np.float64)


class _Words:
    """The library's tokenizer, for words of other letters than ASCII's too."""

    def __init__(self, stem: bool) -> None:
        self._ascii = extra("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=stem)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text, normalized, in order."""
        return [
            token for word in words_in(text) for token in (self._ascii.tokenize(word) if word.isascii() else [word])
        ]


def verbatim_memorization(
    base: Base, rows: Sequence[Row], *, prefix_tokens: int = 64, max_new_tokens: int = 128
) -> Array:
    """Return VerbMem of each row, in percent: ROUGE-L F of how the model continues its beginning.

    MUSE (Shi et al. 2024, arXiv:2407.06460). The beginning is the prompt, as plain text, or the first tokens of a
    `text` row; the row's own continuation is cut to `max_new_tokens`. Rows too short for that are left out.
    """
    prompts, expected = [], []
    for row in rows:
        if "text" in row:
            ids = base.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            prompt, rest = base.tokenizer.decode(ids[:prefix_tokens]), ids[prefix_tokens:]
        else:
            prompt, answer = (question_answer_pairs([row]) or [("", "")])[0]
            rest = base.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if prompt and rest:
            prompts.append(prompt)
            expected.append(base.tokenizer.decode(rest[:max_new_tokens], skip_special_tokens=True))
    texts = answers(base, prompts, max_new_tokens=max_new_tokens, chat_template=False)
    return 100 * rouge_l(expected, texts, part="fmeasure", stem=False)


def knowledge_memorization(
    base: Base, rows: Sequence[Row], shots: Sequence[Row] = (), *, max_new_tokens: int = 32
) -> Array:
    """Return KnowMem of each question, in percent: ROUGE-L F of the model's short answer.

    MUSE (arXiv:2407.06460): plain `Question:`/`Answer:` text behind the solved `shots`, greedy, the
    answer cut off where the next question would begin. Used on the forget set and, as utility, on the retain set.
    """
    solved = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in question_answer_pairs(shots))
    pairs = question_answer_pairs(rows)
    prompts = [f"{solved}Question: {question}\nAnswer: " for question, _ in pairs]
    texts = answers(base, prompts, max_new_tokens=max_new_tokens, chat_template=False, strip=False)
    cut = [_ANSWER_END.split(text)[0] for text in texts]  # an answer that begins with an empty line becomes empty
    return 100 * rouge_l([answer for _, answer in pairs], cut, part="fmeasure", stem=False)
