"""One canonical form of JSON, so that a digest means the same in every service."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Encode JSON data with sorted keys, no spaces, UTF-8; NaN and infinities are refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8")


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return sha256_hex(canonical_json(value))


def derived_id(prefix: str, *parts: object) -> str:
    """Derive an id from its inputs: the same inputs give the same id in every service."""
    return f"{prefix}-{digest_of([str(part) for part in parts])[:24]}"
