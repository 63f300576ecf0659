"""The relay with a resolver under an attacker's hand: `NAMES` is a JSON object of hosts and their answers in turn.

The last answer stays. A name that is not there is not resolved.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from app import egress

NAMES: dict[str, list[list[str]]] = {}


async def resolve(host: str, port: int) -> Sequence[str]:
    answers = NAMES.get(host)
    if answers is None:
        raise OSError("no such name")
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    await asyncio.sleep(0)
    return answer


if __name__ == "__main__":
    NAMES.update(json.loads(Path(sys.argv.pop(1)).read_text()))
    egress.main(resolve)
