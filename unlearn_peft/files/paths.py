"""Where this user's cache and secret are."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .atomic import atomic_file


def digest_key() -> bytes:
    """Return this user's secret for keyed digests: `$UNLEARN_PEFT_DIGEST_KEY`, else a file made on first use."""
    if key := os.environ.get("UNLEARN_PEFT_DIGEST_KEY"):
        return key.encode()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = config / "unlearn_peft" / "digest.key"
    if not path.is_file():
        with atomic_file(path, mode=0o600, replace=False) as temporary:  # of several runs, one makes it for all
            temporary.write_text(secrets.token_hex(32))
    return path.read_text().encode()


def cache_folder() -> Path:
    """Return where converted bases are kept: `$UNLEARN_PEFT_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("UNLEARN_PEFT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unlearn_peft"
