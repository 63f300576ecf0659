"""Secrets from AWS Secrets Manager, with the credentials that boto3 finds: a role, a profile, its variables."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from anyio import CapacityLimiter, to_thread

from app.secrets.locators import AwsLocator
from app.secrets.providers.reading import ANSWER_S, CONNECT_S, Outcome, Unreadable, member, not_installed

_MISSING: Final = {"ResourceNotFoundException", "InvalidRequestException"}  # the second: it is being deleted
_DENIED: Final = {
    *("AccessDeniedException", "UnrecognizedClientException", "InvalidSignatureException", "InvalidClientTokenId"),
    *("ExpiredTokenException", "DecryptionFailure", "SignatureDoesNotMatch"),
}


class SecretsManager:
    """`endpoint_url` replaces AWS's own addresses: a VPC endpoint, or a server of a test."""

    def __init__(self, endpoint_url: str | None) -> None:
        self._threads = CapacityLimiter(4)
        # Making a client takes half a second, and a client may be shared by threads.
        self._client = lru_cache(maxsize=16)(lambda region: _client(region, endpoint_url))

    async def read(self, locator: AwsLocator) -> str:
        """The text of the named stage, or a member of it; raise Unreadable."""
        return await to_thread.run_sync(self._read, locator, limiter=self._threads, abandon_on_cancel=True)

    def _read(self, locator: AwsLocator) -> str:
        try:
            from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415  an extra
        except ImportError:
            raise not_installed("aws") from None
        try:
            client = self._client(locator.region)
            answer = client.get_secret_value(SecretId=locator.secret_id, VersionStage=locator.stage)
        except ClientError as error:
            raise Unreadable(_outcome(error.response.get("Error", {}).get("Code"))) from None
        except BotoCoreError as error:  # no credentials, no connection, no time
            raise Unreadable(Outcome.UNAVAILABLE, type(error).__name__) from None
        text = answer.get("SecretString")
        if not isinstance(text, str):
            raise Unreadable(Outcome.UNUSABLE, "it is binary")
        return member(text, locator.field)


def _outcome(code: object) -> Outcome:
    if code in _MISSING:
        return Outcome.MISSING
    return Outcome.DENIED if code in _DENIED else Outcome.UNAVAILABLE


def _client(region: str, endpoint_url: str | None) -> Any:
    import boto3  # noqa: PLC0415  an extra
    from botocore.config import Config  # noqa: PLC0415  an extra

    config = Config(connect_timeout=CONNECT_S, read_timeout=ANSWER_S, retries={"total_max_attempts": 2})
    return boto3.session.Session().client(
        "secretsmanager", region_name=region, endpoint_url=endpoint_url, config=config
    )
