"""The vocabulary as it was committed: `python -m tests.audit.vocabulary` writes it anew, where versions allow that."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from app.audit.fields import Schema
from app.audit.vocabulary import VOCABULARY

SNAPSHOT: Final = Path(__file__).with_name("vocabulary.json")


def described(vocabulary: Mapping[Any, Schema] = VOCABULARY) -> dict[str, Any]:
    """By type: its version, and what may stand in each of its fields."""
    return {
        str(kind): {"version": schema.version, "fields": {name: f.described for name, f in schema.fields.items()}}
        for kind, schema in sorted(vocabulary.items())
    }


def unannounced(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The types that say something else under the version that they had, or are gone: old events are of them."""
    return [
        kind
        for kind, was in before.items()
        if kind not in now or (now[kind] != was and now[kind]["version"] <= was["version"])
    ]


def main() -> int:
    """Refuse what would let two events of one type and version differ."""
    before = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
    if found := unannounced(before, described()):
        sys.stderr.write(f"Raise the version of {', '.join(found)} in app/audit/vocabulary.py.\n")
        return 1
    SNAPSHOT.write_text(json.dumps(described(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
