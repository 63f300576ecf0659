"""The plain form of a text: what a reader takes it for, in ASCII letters as far as it looks like them.

Compatibility forms (full width, mathematical, circled) become what they stand for, look-alikes of other scripts the
letter that they look like, accents and all that is not seen go, and percent escapes are undone. Each character is
folded alone, so that the time is linear: Unicode's own normalisation sorts runs of accents in quadratic time. The
look-alikes are those of Unicode's confusables (UTS 39) that are common in fonts, not all of them.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final

# So that a plain form takes no more bytes than the widest text of as many characters.
_LONGEST: Final = 4
_LETTERS: Final = {
    " ": "\u2800",
    "a": "\u0430\u0251\u03b1\u237a",
    "c": "\u0441\u03f2\u2ca5",
    "d": "\u0501\u056a",
    "e": "\u0435\u04bd\u03b5",
    "f": "\u1e9d\u0584",
    "g": "\u0261\u0581",
    "h": "\u04bb\u0570",
    "i": "\u0456\u0131\u03b9\u2170\u04cf",
    "j": "\u0458\u03f3",
    "k": "\u043a\u03ba",
    "l": "\u217c\u01c0",
    "m": "\u043c\u217f",
    "n": "\u043f\u0578\u057c",
    "o": "\u043e\u03bf\u0585\u03c3",
    "p": "\u0440\u03c1",
    "q": "\u051b\u0566",
    "r": "\u0433\u2c85",
    "s": "\u0455\ua731",
    "t": "\u0442\u03c4",
    "u": "\u03c5\u057d\u028b\u0446",
    "v": "\u03bd\u0475",
    "w": "\u051d\u03c9\u0461\u0561",
    "x": "\u0445\u03c7",
    "y": "\u0443\u03b3\u10e7",
    "z": "\u1d22",
    "b": "\u042c\u0432\u0185",
    "A": "\u0410\u0391\u13aa\ua4ee",
    "B": "\u0412\u0392\u13f4\ua4d0",
    "C": "\u0421\u03f9\u13df\ua4da",
    "D": "\u13a0\ua4d3",
    "E": "\u0415\u0395\u13ac\ua4f0",
    "F": "\u03dc\ua4dd",
    "G": "\u050c\u13c0\ua4d6",
    "H": "\u041d\u0397\u13bb\ua4e7",
    "I": "\u0406\u0399\u04c0\ua4f2",
    "J": "\u0408\u13ab\ua4d9",
    "K": "\u041a\u039a\u13e6\ua4d7",
    "L": "\u13de\ua4e1",
    "M": "\u041c\u039c\u13b7\ua4df",
    "N": "\u039d\ua4e0",
    "O": "\u041e\u039f\u0555\ua4f3",
    "P": "\u0420\u03a1\u13e2\ua4d1",
    "Q": "\u051a",
    "R": "\u13a1\ua4e3",
    "S": "\u0405\u054f\u13da\ua4e2",
    "T": "\u0422\u03a4\u13a2\ua4d4",
    "U": "\u054d\ua4f4",
    "V": "\u0474\u13d9\ua4e6",
    "W": "\u051c\u13b3\ua4ea",
    "X": "\u0425\u03a7\ua4eb",
    "Y": "\u04ae\u03a5\ua4ec",
    "Z": "\u0396\u13c3\ua4dc",
    "/": "\u2044\u2215\u29f8\u2571\u27cb\u3033",
    "\\": "\u2216\u29f5\u29f9",
    ".": "\u2024\u3002\ua4f8",
    "<": "\u2039\u02c2\u1438\u276e\u3008\u27e8",
    ">": "\u203a\u02c3\u1433\u276f\u3009\u27e9",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\u30fc",
    "'": "\u2019\u2018\u201b\u02bc\u2032",
    '"': "\u201c\u201d\u201f\u2033",
    ";": "\uff1b",
    "|": "\u2223\uff5c",
    "&": "\uff06",
}
_FOLDED: Final = {lookalike: letter for letter, lookalikes in _LETTERS.items() for lookalike in lookalikes}
_NAMED: Final = re.compile(
    r"(?:LATIN (SMALL|CAPITAL) LETTER|LATIN LETTER SMALL CAPITAL"
    r"|REGIONAL INDICATOR SYMBOL LETTER|NEGATIVE (?:CIRCLED|SQUARED) LATIN CAPITAL LETTER) ([A-Z])(?: WITH .+)?"
)
# Accents, formats and controls, by category; fillers, which are letters.
_UNSEEN: Final = frozenset({"Mn", "Me", "Cf", "Cc"})
_FILLERS: Final = "\u115f\u1160\u3164\uffa0"
_ASCII_UNSEEN: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_ESCAPE: Final = re.compile(r"%(?:25){0,3}([2-7][0-9a-fA-F])")


def plain(text: str) -> str:
    """Give `text` itself where it is plain already. Letters keep their case."""
    folded = _ASCII_UNSEEN.sub("", text) if text.isascii() else "".join(map(_fold, text))
    return _ESCAPE.sub(_unescaped, folded) if "%" in folded else folded


def _unescaped(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16))


@lru_cache(maxsize=8192)
def _fold(character: str) -> str:
    if character.isspace():
        return character
    parts = (_letter(part) for part in unicodedata.normalize("NFKD", _FOLDED.get(character, character)))
    folded = "".join(parts)[:_LONGEST]
    return folded if len(folded.encode(errors="replace")) <= _LONGEST else folded[0]


def _letter(part: str) -> str:
    if unicodedata.category(part) in _UNSEEN or part in _FILLERS:
        return ""
    if (digit := unicodedata.decimal(part, None)) is not None:
        return str(digit)
    if found := _NAMED.fullmatch(unicodedata.name(part, "")):
        return found[2].lower() if found[1] == "SMALL" else found[2]
    return _FOLDED.get(part, part)
