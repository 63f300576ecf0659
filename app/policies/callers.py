"""What policies make of their callers: the latest callers of all policies of the process, within one bound.

A policy never changes, so what is kept of a caller under it stays true; where the policy goes, its callers go.
"""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

import cedarpy

from app.policies import footprint
from app.policies.document import PolicyDocument
from app.policies.rules import OVERRIDE
from app.policies.standing import RuleIndex

# In bytes, as `footprint` has them.
_MAX_KEPT: Final = 64 << 20
# To let go of so many takes at most milliseconds.
_AT_ONCE: Final = 100


@dataclass(frozen=True, slots=True)
class PolicyCaller:
    """What the rules know of a caller: the rules that mean it, and itself with all that it is in."""

    meant_by: int
    entities: cedarpy.Entities
    weight: int


@dataclass(eq=False, slots=True)
class Owner:
    """A policy, as itself and no other, for as long as something is kept of its callers."""

    keys: set[Key] = field(default_factory=set)


Key = tuple[Owner, str, str]


class Kept:
    """Callers by policy, user id and role, in all no more than so many bytes; threads share it."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._callers: OrderedDict[Key, PolicyCaller] = OrderedDict()
        self._gone: deque[Owner] = deque()
        self._lock = Lock()
        self.weight = 0

    def find(self, key: Key) -> PolicyCaller | None:
        """The caller, who is now the latest. Without the lock: each step is one of the interpreter."""
        try:
            self._callers.move_to_end(key)
            return self._callers[key]
        except KeyError:
            return None

    def add(self, key: Key, caller: PolicyCaller) -> None:
        """Keep the caller, and let those go who were not asked for longest."""
        with self._lock:
            self._let_go()
            if key not in self._callers:
                self._callers[key] = caller
                key[0].keys.add(key)
                self.weight += caller.weight
            while self.weight > self._bound:
                oldest, caller = self._callers.popitem(last=False)
                oldest[0].keys.remove(oldest)
                self.weight -= caller.weight

    def forget(self, owner: Owner) -> None:
        """Let a policy's callers go, those of a large one little by little.

        The garbage collector calls it, from whatever a thread is at, with the lock too: so it waits for nothing.
        """
        self._gone.append(owner)
        if self._lock.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._lock.release()

    def _let_go(self) -> None:
        for _ in range(_AT_ONCE):
            while self._gone and not self._gone[0].keys:
                self._gone.popleft()
            if not self._gone:
                break
            self.weight -= self._callers.pop(self._gone[0].keys.pop()).weight


_KEPT: Final = Kept(_MAX_KEPT)


class PolicyCallers:
    """The callers of one policy, by user id and role."""

    def __init__(self, document: PolicyDocument, index: RuleIndex, schema: cedarpy.Schema, *, tools: int) -> None:
        self._document = document
        self._index = index
        self._schema = schema
        self._entities = tools + len(document.servers) + 1
        self._kept = _KEPT
        self._owner = Owner()
        weakref.finalize(self, self._kept.forget, self._owner).atexit = False

    def __call__(self, user_id: str, role: str) -> PolicyCaller:
        """As the rules know it."""
        key = self._owner, user_id, role
        if (caller := self._kept.find(key)) is None:
            caller = self._made(user_id, role)
            self._kept.add(key, caller)
        return caller

    def _made(self, user_id: str, role: str) -> PolicyCaller:
        groups = [("Role", role), *((OVERRIDE, str(place)) for place in self._document.meant_for(user_id, role))]
        user = {
            "uid": {"type": "User", "id": user_id},
            "attrs": {},
            "parents": [{"type": kind, "id": name} for kind, name in groups],
        }
        meant_by = self._index.meaning(frozenset({("User", user_id), *groups}))
        entities = cedarpy.Entities.from_json_str(json.dumps([user]), self._schema)
        weight = footprint.of_caller(user_id, meant_by, entities=self._entities, groups=len(groups))
        return PolicyCaller(meant_by, entities, weight)
