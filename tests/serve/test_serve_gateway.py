"""The server's tests of test_serve.py once more, with the gateway engine before a stand-in for vLLM."""

import pytest
from fake_vllm import FakeVllm, install_vllm, serving
from serving import Fixed, make_adapters, make_policy_values, running
from test_serve import (  # noqa: F401
    FORGET,
    MAY_ADD,
    MODEL,
    test_a_request_can_add_but_never_take_away,
    test_chat_streams_what_it_answers,
    test_every_tenant_gets_what_its_set_gives_alone_with_plain_peft,
    test_keys,
    test_models_and_health,
    test_stop_seed_n_logprobs,
    test_what_changes_nothing_is_accepted,
    test_wrong_requests_are_told_what_is_wrong_and_not_quoted,
)

from unlearn_peft import load_base
from unlearn_peft.serve.limits import Limits
from unlearn_peft.serve.vllm.engine import VllmEngine
from unlearn_peft.serve.vllm.plugin import Sets, make_resolver


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder)


@pytest.fixture(scope="module")
def shared(tiny_folder, adapters, tmp_path_factory):
    source = Fixed(make_policy_values(adapters, FORGET, MAY_ADD))
    sets = Sets(source, tmp_path_factory.mktemp("sets"), max_rank=16, max_error=0.01, budget_bytes=10**9)
    with pytest.MonkeyPatch.context() as patch:
        install_vllm(patch)
        fake = FakeVllm(load_base(str(tiny_folder)), make_resolver(sets), context=256)
        with serving(fake) as where:
            engine = VllmEngine([where], str(tiny_folder), name=MODEL)
            with running(engine, source, limits=Limits(batch=4)) as (handler, url):
                yield handler, url
