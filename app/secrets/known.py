"""The texts that this process has resolved, and what they look like where they must not stand."""

from __future__ import annotations

import base64
import json
import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice, takewhile
from typing import Any, Final
from urllib.parse import quote, quote_plus, unquote
from uuid import UUID

import re2

from app.secrets.sealing import MAX_BYTES

# A shorter text would blank ordinary words.
SHORTEST: Final = 6
# No form of a text has more characters: of a control character JSON makes six.
LONGEST: Final = 6 * MAX_BYTES
# What is left of an encoded text once its ends, which depend on what stands around it, are cut off.
_SHORTEST_ENCODED: Final = 10
_MAX_TEXTS: Final = 250  # of one tenant: those that it has now, and the newest of those that it had
_MANY: Final = 1_000
_MEMORY_BYTES: Final = 32 << 20  # what RE2 may take for what it has seen; with less it would become slow
_MARK: Final = "[redacted]"
# Characters by which the beginning of a text is known: most secrets are no longer.
_HEAD: Final = 64
# Who logs in by a URL. The library's own way would keep the last hundred URLs that it has split, which may be secrets.
_USER: Final = re.compile(r"(?:[^:/?#]*:)?//([^/?#]*)@")


class KnownTexts:
    """Of each tenant its own. A text stays known when its secret has been rotated or deleted: who had it may say it.

    Threads may redact while others are added.
    """

    def __init__(self) -> None:
        self._texts: dict[UUID, OrderedDict[str, frozenset[bytes]]] = {}
        self._searches: dict[UUID, _Search] = {}

    def __repr__(self) -> str:
        return f"KnownTexts({len(self._texts)} tenants)"

    def add(self, tenant_id: UUID, text: str) -> None:
        """Redact it from now on; the one that was added longest ago goes where there are too many."""
        texts = self._texts.setdefault(tenant_id, OrderedDict())
        if text in texts:
            texts.move_to_end(text)
            return
        if not (cores := frozenset(map(_core, forms(text)))):
            return
        texts[text] = cores
        if len(texts) > _MAX_TEXTS:
            texts.popitem(last=False)
        self._searches[tenant_id] = _Search(dict(texts))

    def tenants(self) -> list[UUID]:
        """Of whom there are any."""
        return list(self._texts)

    def forget(self, tenant_id: UUID) -> None:
        """Those of a tenant whom nobody reads any more."""
        self._searches.pop(tenant_id, None)
        self._texts.pop(tenant_id, None)

    def redact(self, tenant_id: UUID, text: str) -> str:
        """The text without any form of what the tenant has had resolved."""
        search = self._searches.get(tenant_id)
        return search.redact(text) if search else text

    def open_from(self, tenant_id: UUID, text: str) -> int:
        """Where in a text that goes on something may begin that is not whole yet; its length where nothing does."""
        search = self._searches.get(tenant_id)
        return search.beginnings.open_from(text) if search else len(text)


class Beginnings:
    """How texts begin, so that one that comes in pieces is known before it is whole.

    Of each only the head is kept: what has a head, and is shorter than the longest with that head, may be one.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._lengths: dict[str, int] = {}
        for text in texts:
            head = text[:_HEAD]
            self._lengths[head] = max(self._lengths.get(head, 0), len(text))
        self._heads = sorted(self._lengths)
        self._first = frozenset(head[0] for head in self._heads)
        self._longest = max(self._lengths.values(), default=0)

    def open_from(self, text: str) -> int:
        """The first place from which all the rest may be the beginning of one; the length of the text for none."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first and self._may_begin(text[at : at + _HEAD], left=len(text) - at):
                return at
        return len(text)

    def _may_begin(self, piece: str, *, left: int) -> bool:
        heads = islice(self._heads, bisect_left(self._heads, piece), None)
        return any(left < self._lengths[head] for head in takewhile(lambda head: head.startswith(piece), heads))


class _Search:
    """First for six bytes of each form, all at once, which takes about 0.1 ms for 64 KB. Most often there are none.

    So no more is kept of a form, of which a text has up to twelve.
    """

    def __init__(self, texts: Mapping[str, frozenset[bytes]]) -> None:
        self._texts = texts

    @cached_property
    def beginnings(self) -> Beginnings:
        """For those who read a text as it comes."""
        return Beginnings(form for text in self._texts for form in forms(text))

    def redact(self, text: str) -> str:
        near = self._near(text.encode(errors="surrogatepass"))
        if not near:
            return text
        said = {form for known, cores in self._texts.items() if not cores.isdisjoint(near) for form in forms(known)}
        # The longest first, so that a text inside another leaves no rest of it.
        for form in sorted(said, key=_order):
            text = text.replace(form, _MARK)
        return text

    def _near(self, data: bytes) -> set[bytes]:
        """The cores that it holds, among others. One may begin inside of another that was found."""
        found = list(islice(self._cores.finditer(data), _MANY))
        starts: Iterable[int] = (at for hit in found for at in range(*hit.span()))
        if len(found) == _MANY:  # somebody wants this to take long; then it is faster to look everywhere
            starts = range(len(data))
        return {data[at : at + SHORTEST] for at in starts}

    @cached_property
    def _cores(self) -> Any:
        options = re2.Options()
        options.encoding = re2.Options.Encoding.LATIN1  # of bytes
        options.max_mem = _MEMORY_BYTES
        options.log_errors = False
        cores = sorted(frozenset().union(*self._texts.values()))
        compiled = re2.compile(b"|".join(map(re2.escape, cores)), options)
        re2.purge()  # it would keep the newest 128, with what each has taken, whoever has let them go
        return compiled


def _core(form: str) -> bytes:
    """Six bytes of its middle: what begins or ends a text may stand anywhere, such as `https:`."""
    data = form.encode(errors="surrogatepass")
    start = (len(data) - SHORTEST) // 2
    return data[start : start + SHORTEST]


def _order(form: str) -> tuple[int, str]:
    return -len(form), form


def forms(text: str) -> frozenset[str]:
    """As it is, as JSON, URLs and base64 have it, and the password in it where it is a URL."""
    found = {form for part in (text, *_passwords(text)) for form in _spellings(part)}
    return frozenset(form for form in found if len(form) >= SHORTEST)


def _passwords(text: str) -> Iterator[str]:
    found = _USER.match(text)
    password = found[1].partition(":")[2] if found else ""
    if len(password) >= SHORTEST:
        yield from (password, unquote(password))


def _spellings(text: str) -> Iterator[str]:
    if len(text) < SHORTEST:
        return
    yield text
    yield json.dumps(text)[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    for quoted in (quote(text, safe=""), quote(text), quote_plus(text)):
        yield quoted
        yield _lower_hex(quoted)
    yield from _base64(text.encode())


def _lower_hex(quoted: str) -> str:
    head, *tails = quoted.split("%")
    return "%".join([head, *(tail[:2].lower() + tail[2:] for tail in tails)])


def _base64(data: bytes) -> Iterator[str]:
    """By itself, and wherever it begins in what was encoded: without the characters that hold others' bits, too."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + data).decode()
        end = (before + len(data)) * 8 // 6  # whole characters that hold nothing but the text
        core = encoded[-(-before * 8 // 6) : end]
        if len(core) >= _SHORTEST_ENCODED:
            yield from (core, core.translate(_URLSAFE))


_URLSAFE: Final = str.maketrans("+/", "-_")
