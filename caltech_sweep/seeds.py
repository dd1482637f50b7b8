"""Keys for random streams: what is drawn depends on a key, never on how far a global stream has run."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed for a tuple such as (seed, "shuffle", epoch)."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
