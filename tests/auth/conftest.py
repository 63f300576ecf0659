from __future__ import annotations

import pytest

from app.auth.jwks import parse_jwks
from app.auth.tokens import TrustedIssuer
from tests.auth.forgery import AUDIENCE, ISSUER, Issuer


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture(scope="session")
def trusted(issuer: Issuer) -> TrustedIssuer:
    return TrustedIssuer(ISSUER, AUDIENCE, parse_jwks(issuer.jwks))
