"""The arguments of a call as one text: what is sealed, hashed, and approved of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def canonical(arguments: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no spaces: equal for equal arguments."""
    text = json.dumps(arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()  # half a surrogate pair, as JSON escapes it
