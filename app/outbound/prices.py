"""What a model's tokens cost: dated prices, in integers, so that what is reserved and what is used add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

# A million tokens at one USD are a million micro-USD: the number of a price is micro-USD a token.
_PER_MICRO_USD: Final = 1_000_000
USD_PATTERN: Final = r"^(0|[1-9][0-9]{0,6})(\.[0-9]{1,6})?$"
Usd = Annotated[str, StringConstraints(pattern=USD_PATTERN)]


@dataclass(frozen=True, slots=True)
class Price:
    """Of a token, in millionths of a micro-USD."""

    input: int
    output: int

    def cost(self, input_tokens: int, output_tokens: int) -> int:
        """Micro-USD, rounded up once: never less than what the tokens cost."""
        return -(-(self.input * input_tokens + self.output * output_tokens) // _PER_MICRO_USD)


class PriceIn(BaseModel):
    """What a million tokens of a model cost from a day (UTC) on, in USD, as decimal strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_day: date = Field(alias="from")
    input: Usd
    output: Usd

    @property
    def price(self) -> Price:
        """In our integers."""
        return Price(micro_usd(self.input), micro_usd(self.output))


def _distinct(prices: tuple[PriceIn, ...]) -> tuple[PriceIn, ...]:
    if len({each.from_day for each in prices}) < len(prices):
        raise ValueError("has two prices from the same day on")
    return prices


# By model, in any order of days.
Prices = Annotated[
    Mapping[str, Annotated[tuple[PriceIn, ...], Field(max_length=100), AfterValidator(_distinct)]],
    Field(max_length=100),
]
PRICES: Final[TypeAdapter[Prices]] = TypeAdapter(Prices)


def micro_usd(usd: str) -> int:
    """Of an amount that fits `Usd`, exactly."""
    whole, _, fraction = usd.partition(".")
    return int(whole) * 1_000_000 + int(fraction.ljust(6, "0"))


def usd(micro: int) -> str:
    """As a decimal string of at most six places."""
    whole, fraction = divmod(micro, 1_000_000)
    return f"{whole}.{fraction:06}".rstrip("0").rstrip(".") if fraction else str(whole)


def price_on(day: date, prices: Iterable[PriceIn]) -> Price | None:
    """The one that holds on a day: of those that have begun, the last."""
    begun = [each for each in prices if each.from_day <= day]
    return max(begun, key=lambda each: each.from_day).price if begun else None
