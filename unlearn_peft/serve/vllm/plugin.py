"""The plugin inside vLLM: the name of a set of adapters -> one LoRA, made on demand from the policy, or nothing.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Unless $UNLEARN_PEFT_POLICY
is set it does nothing. Otherwise, when a request names a model that vLLM does not know, vLLM asks the resolver, which
answers only names with a digest (lora_names.py), and only if the policy still gives a set of that digest. Whatever goes
wrong, the answer is None, and vLLM refuses the request; it never falls back to the base.

    UNLEARN_PEFT_POLICY          policy.yaml, a database's path or URL: what open_policy takes
    UNLEARN_PEFT_SETS            folder for composed sets, on this machine [~/.cache/unlearn_peft/vllm_sets]
    UNLEARN_PEFT_SETS_GB         delete unused sets beyond this [10]
    UNLEARN_PEFT_SETS_GRACE      seconds that a set stays after its last use: longer than requests run [3600]
    UNLEARN_PEFT_MAX_RANK        vLLM's --max-lora-rank [64]
    UNLEARN_PEFT_MAX_ERROR       refuse sets of which truncation would lose more, in any module [0.01]
    UNLEARN_PEFT_TRUSTED_KEYS    public keys, as --trusted-keys takes them, joined by ':'; a signature must then hold
    UNLEARN_PEFT_REQUIRE_SIGNATURE=1     refuse adapters that none of these has signed
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1   or vLLM asks no resolver
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import PolicyError, UnlearnError

if TYPE_CHECKING:
    from ...adapters.trust import Trust
    from ..policy.policy import PolicySource
    from .lora_cache import SetCache

NAME = "unlearn_peft"
_YES, _NO = ("1", "true", "t", "yes", "y", "on"), ("", "0", "false", "f", "no", "n", "off")  # as the commands have it
_LARGEST_ID = 2**31 - 1  # vLLM keeps ids in int32 in places
logger = logging.getLogger(__name__)


def register() -> None:
    """Register the resolver with vLLM if $UNLEARN_PEFT_POLICY is set. May be called again."""
    if not os.environ.get("UNLEARN_PEFT_POLICY"):
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, make_resolver(Sets.from_environment()))


class Sets:
    """A policy (as `open_policy` takes it, or its source) and the sets made from it, opened when first needed.

    Signatures that `trust` requires are required beside those that the tenant's policy requires; `limits`: see
    `SetCache`.
    """

    def __init__(self, policy: str | PolicySource, folder: Path, *, trust: Trust | None = None, **limits: Any) -> None:
        self._policy, self._folder, self._trust, self._limits = policy, folder, trust, limits
        self._opened: tuple[PolicySource, SetCache] | None = None
        self._ids: dict[int, str] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls) -> Sets:
        """Read the environment variables named above.

        Raises:
            PolicyError: if one of them is malformed.
            TrustError: if keys cannot be read.
        """
        from ...adapters.trust import Trust
        from ...files.paths import cache_folder

        def number(name: str, default: float) -> float:
            text = os.environ.get(name) or str(default)
            try:
                return float(text)
            except ValueError:
                raise PolicyError(f"${name} is '{text}', expected a number") from None

        keys = [key for key in os.environ.get("UNLEARN_PEFT_TRUSTED_KEYS", "").split(os.pathsep) if key]
        required = os.environ.get("UNLEARN_PEFT_REQUIRE_SIGNATURE", "").lower()
        if required not in (*_YES, *_NO):
            raise PolicyError(f"$UNLEARN_PEFT_REQUIRE_SIGNATURE is '{required}', expected 1 or 0")
        return cls(
            os.environ["UNLEARN_PEFT_POLICY"],
            Path(os.environ.get("UNLEARN_PEFT_SETS") or cache_folder() / "vllm_sets"),
            trust=Trust.read(*keys, required=required in _YES) if keys or required in _YES else None,
            max_rank=int(number("UNLEARN_PEFT_MAX_RANK", 64)),
            max_error=number("UNLEARN_PEFT_MAX_ERROR", 0.01),
            budget_bytes=int(number("UNLEARN_PEFT_SETS_GB", 10) * 1e9),
            grace=number("UNLEARN_PEFT_SETS_GRACE", 3600),
        )

    def path_of(self, name: str, base: str) -> tuple[Path, int]:
        """Return the folder of the set of this name, made and verified, and its id; this may take seconds."""
        from .lora_names import parse_set_name

        requested = parse_set_name(name)
        source, cache = self._open()
        policy = source.current()
        forget = dict(requested.forget) if requested.tenant is None else policy.forget_of(requested.tenant)
        if unknown := [adapter for adapter in forget if adapter not in policy.adapters]:
            raise PolicyError(f"unknown adapter '{unknown[0]}'")
        tenants = None if requested.tenant is None else policy.trust_of(requested.tenant)
        trusts = [trust for trust in (self._trust, tenants) if trust is not None]
        return cache.get(forget, policy, requested.digest, base, trusts), self._id_of(requested.digest)

    def used_by(self, path: Path, user: object) -> None:
        """See `SetCache.used_by`."""
        self._open()[1].used_by(path, user)

    def _open(self) -> tuple[PolicySource, SetCache]:
        from .lora_cache import SetCache

        with self._lock:
            if self._opened is None:
                source = _source(self._policy) if isinstance(self._policy, str) else self._policy
                self._opened = source, SetCache(self._folder, **self._limits)
            return self._opened

    def _id_of(self, digest: str) -> int:
        """Return a positive number from the digest; the next free one if another digest has it."""
        with self._lock:
            number = int(digest[:16], 16) % _LARGEST_ID + 1
            while self._ids.setdefault(number, digest) != digest:
                number = number % _LARGEST_ID + 1
            return number


def _source(policy: str) -> PolicySource:
    """Open a policy; a file without importing what a store needs, which vLLM's environment does not have."""
    if "://" not in policy and policy.endswith((".yaml", ".yml")):
        from ..policy.yaml_file import PolicyFile

        return PolicyFile(policy)
    from ..policy.store import open_policy

    return open_policy(policy)


def make_resolver(sets: Sets) -> Any:
    """Return a `vllm.lora.resolver.LoRAResolver` that answers from `sets`."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class SetRequest(LoRARequest, weakref=True):  # type: ignore[misc, call-arg, unused-ignore]
        """A LoRARequest whose end can be noticed: vLLM keeps it for as long as it knows the name."""

        def __reduce__(self) -> Any:
            return LoRARequest, (self.lora_name, self.lora_int_id, self.lora_path)

    class SetResolver(LoRAResolver):  # type: ignore[misc, unused-ignore]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """Return a set's LoRA, or None if there is no set exactly as named."""
            try:
                path, number = await asyncio.to_thread(sets.path_of, lora_name, base_model_name)
                request = SetRequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))
                sets.used_by(path, request)
                return request
            except UnlearnError as error:
                logger.error("refused a set: %s", error)
            except Exception as error:  # a database's, the file system's: refused too, and vLLM goes on
                logger.exception("refused a set: %s", type(error).__name__)
            return None

    return SetResolver()
