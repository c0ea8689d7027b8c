"""Bodies of answers: as JSON, in parts that are small."""

import json

from unlearn_peft.serve.api import responses
from unlearn_peft.serve.api.responses import Answer, ResponseFormat
from unlearn_peft.serve.engine.base import Candidate, TokenLogprobs


def test_a_body_with_all_log_probabilities_is_made_in_small_parts(monkeypatch):
    token = TokenLogprobs(Candidate(1, "ö".encode(), -0.5), tuple(Candidate(n, b"%d" % n, -n / 3) for n in range(20)))
    answers = [Answer(n, 'said "so"\u2028 ö', "length", [token] * 50) for n in range(4)]
    dumps, longest = json.dumps, []

    def counted(value, **settings):
        text = dumps(value, **settings)
        longest.append(len(text))
        return text

    for chat in (True, False):
        form = ResponseFormat(chat, "id", "tiny", 1, "fp", True)
        monkeypatch.setattr(responses.json, "dumps", counted)
        text = form.text(answers, {"total_tokens": 3})
        monkeypatch.undo()
        assert json.loads(text) == json.loads(dumps(form.body(answers, {"total_tokens": 3})))
        assert max(longest) < 2000 < 20_000 < len(text)
