"""Prices of a judge's tokens, in dollars."""

from __future__ import annotations

from dataclasses import dataclass

from palate.annotate.judges.records import Amount
from palate.errors import ConfigError


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens.

    Attributes:
        source: "given", the price list, "local", or "unknown"; unknown costs count as 0.
    """

    per_million_in: float
    per_million_out: float
    source: str

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Return the cost of these tokens in dollars."""
        return (tokens_in * self.per_million_in + tokens_out * self.per_million_out) / 1e6

    def amount(self, tokens_in: int, tokens_out: int) -> Amount:
        """Return the tokens with their cost."""
        return Amount(tokens_in + tokens_out, self.cost(tokens_in, tokens_out))


FREE = Price(0.0, 0.0, "local")


def price_of(model: str, url: str, given_in: float | None, given_out: float | None, *, needed: bool) -> Price:
    """Return the price of a server's model: the given price, else the price in `genai-prices` if installed.

    Args:
        model: the model's name on the server.
        url: the server's address.
        given_in, given_out: `--price-in` and `--price-out`.
        needed: the cost is limited, so the price must be known.

    Raises:
        ConfigError: only one of the two prices is given, or a needed price is unknown.
    """
    if (given_in is None) != (given_out is None):
        raise ConfigError("--price-in and --price-out go together; give both, in dollars per million tokens")
    if given_in is not None and given_out is not None:
        return Price(given_in, given_out, "given")
    listed = _listed(model, url)
    if listed is not None:
        return listed
    if needed:
        raise ConfigError(
            f"the price of {model!r} at {url} is unknown, so --max-cost cannot be checked; give "
            "--price-in and --price-out in dollars per million tokens, or limit --max-verdicts or "
            "--max-judge-tokens instead (the package genai-prices knows the prices of many hosted models)"
        )
    return Price(0.0, 0.0, "unknown")


def _listed(model: str, url: str) -> Price | None:
    try:
        import genai_prices
    except ImportError:
        return None
    million = genai_prices.Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    try:
        priced = genai_prices.calc_price(million, model, provider_api_url=url)
    except LookupError:
        return None
    source = f"genai-prices {genai_prices.__version__}"
    return Price(float(priced.input_price), float(priced.output_price), source)
