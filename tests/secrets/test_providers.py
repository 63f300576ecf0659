"""Providers as they are: moto for AWS, OpenBao through Vault's API, an HTTPS stand-in for Key Vault, files."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from azure.core.credentials import AccessToken
from azure.core.pipeline.transport import RequestsTransport
from azure.identity import ClientSecretCredential

from app.errors import ConfigurationError
from app.secrets.locators import AwsLocator, AzureLocator, EnvironmentLocator, FileLocator, Locator, VaultLocator, parse
from app.secrets.providers import aws
from app.secrets.providers.aws import SecretsManager
from app.secrets.providers.azure import KeyVaults
from app.secrets.providers.environment import Environment
from app.secrets.providers.file import Files
from app.secrets.providers.reading import Outcome, Unreadable
from app.secrets.providers.vault import Vault
from app.settings import tenants_variables
from tests.secrets.ground import (
    REGION,
    ROOT_TOKEN,
    AwsServer,
    Ground,
    KeyVault,
    VaultServer,
    aws_server,
    free_port,
    key_vault,
    resolve,
    vault_server,
)


async def outcome(reading: Awaitable[str]) -> Outcome:
    with pytest.raises(Unreadable) as raised:
        await reading
    return raised.value.outcome


# The environment


async def test_only_variables_of_the_prefix_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULKHEAD_SECRET_A", "text-of-a")
    provider = Environment(tenants_variables("BULKHEAD_SECRET_"))
    assert await provider.read(EnvironmentLocator(provider="environment", variable="BULKHEAD_SECRET_A")) == "text-of-a"
    missing = EnvironmentLocator(provider="environment", variable="BULKHEAD_SECRET_B")
    assert await outcome(provider.read(missing)) is Outcome.MISSING
    path = EnvironmentLocator.model_construct(provider="environment", variable="PATH")  # past the locator's own check
    assert os.environ["PATH"]
    assert await outcome(provider.read(path)) is Outcome.MISSING


# Files


def at(path: str) -> FileLocator:
    return FileLocator.model_construct(provider="file", path=path)  # past the locator's own check


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside").write_text("text-of-outside")
    return inside


@pytest.mark.parametrize(
    ("content", "text"), [("a-text\n", "a-text"), ("a-text\r\n", "a-text"), ("a\nb\n\n", "a\nb\n")]
)
async def test_a_files_last_line_end_is_no_part_of_its_text(folder: Path, content: str, text: str) -> None:
    (folder / "key").write_bytes(content.encode())
    assert await Files(folder).read(at("key")) == text


async def test_a_secret_mounted_as_kubernetes_does_is_read_and_read_anew(folder: Path) -> None:
    for version in ("first", "second"):
        (folder / f"..{version}").mkdir()
        (folder / f"..{version}" / "key").write_text(f"{version}-text")
        (folder / "..new").symlink_to(f"..{version}")
        (folder / "..new").replace(folder / "..data")
        if version == "first":
            (folder / "key").symlink_to("..data/key")
        assert await Files(folder).read(at("key")) == f"{version}-text"


@pytest.mark.parametrize("way", ["../outside", "link", "far/outside", "/{}/outside"])
async def test_no_way_leads_outside(folder: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "link").symlink_to("../outside")
    (folder / "far").symlink_to(folder.parent)
    path = way.format(str(folder.parent).lstrip("/"))
    assert await outcome(Files(folder).read(at(path))) is Outcome.DENIED
    monkeypatch.setattr(Path, "is_relative_to", lambda *_: True)
    assert await Files(folder).read(at(path)) == "text-of-outside", "the control"


async def test_what_is_no_small_text_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "large").write_text("x" * 9000)
    (folder / "binary").write_bytes(b"\xff\xfe\xfd")
    (folder / "loop").symlink_to("loop")
    found = {name: await outcome(Files(folder).read(at(name))) for name in ("pipe", "large", "binary", "none", "loop")}
    unusable = dict.fromkeys(("pipe", "large", "binary"), Outcome.UNUSABLE)
    assert found == unusable | {"none": Outcome.MISSING, "loop": Outcome.UNAVAILABLE}
    assert await outcome(Files(folder).read(at("."))) is not Outcome.READ
    assert await outcome(Files(None).read(at("key"))) is Outcome.NOT_CONFIGURED


async def test_a_bound_file_is_resolved_by_the_service(ground: Ground) -> None:
    tenant = await ground.new_tenant()
    (ground.mounted / "reports-dsn").write_text("postgresql://reader:pass-word@127.0.0.1/reports\n")
    await ground.bind(tenant, "dsn", provider="file", path="reports-dsn")
    await ground.bind(tenant, "shared", provider="environment", variable="BULKHEAD_SECRET_SHARED")
    secret = await resolve(ground.store, tenant, "dsn", "shared")
    assert secret.texts["dsn"].endswith("/reports")
    assert secret.texts["shared"] == "from-the-environment"


# AWS


@pytest.fixture(scope="module")
def manager() -> Iterator[AwsServer]:
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        with aws_server() as server:
            yield server


def at_aws(secret_id: str, **more: Any) -> AwsLocator:
    return AwsLocator(provider="aws", region=REGION, secret_id=secret_id, **more)


async def test_a_secret_of_aws_is_read_by_name_arn_field_and_stage(manager: AwsServer) -> None:
    made = manager.admin.create_secret(Name="prod/mcp-use/openai-key", SecretString='{"key": "first-text", "n": 7}')
    provider = SecretsManager(manager.url)
    for secret_id in ("prod/mcp-use/openai-key", made["ARN"]):
        assert await provider.read(at_aws(secret_id, field="key")) == "first-text"
    manager.admin.put_secret_value(SecretId=made["ARN"], SecretString='{"key": "second-text"}')
    assert await provider.read(at_aws(made["ARN"], field="key")) == "second-text"
    assert await provider.read(at_aws(made["ARN"], field="key", stage="AWSPREVIOUS")) == "first-text"
    assert await provider.read(at_aws(made["ARN"])) == '{"key": "second-text"}'


async def test_what_aws_cannot_give_is_told_apart(manager: AwsServer) -> None:
    manager.admin.create_secret(Name="plain", SecretString="no-json")
    manager.admin.create_secret(Name="number", SecretString='{"key": 7}')
    manager.admin.create_secret(Name="binary", SecretBinary=b"\x00\xff")
    provider = SecretsManager(manager.url)
    assert await outcome(provider.read(at_aws("none"))) is Outcome.MISSING
    assert await outcome(provider.read(at_aws("plain", field="key"))) is Outcome.UNUSABLE
    assert await outcome(provider.read(at_aws("number", field="key"))) is Outcome.UNUSABLE
    assert await outcome(provider.read(at_aws("number", field="other"))) is Outcome.MISSING
    assert await outcome(provider.read(at_aws("binary"))) is Outcome.UNUSABLE
    assert await outcome(provider.read(at_aws("plain", stage="AWSPREVIOUS"))) is Outcome.MISSING
    manager.admin.delete_secret(SecretId="plain")
    assert await outcome(provider.read(at_aws("plain"))) is Outcome.MISSING
    nowhere = SecretsManager(f"http://127.0.0.1:{free_port()}")
    assert await outcome(nowhere.read(at_aws("plain"))) is Outcome.UNAVAILABLE


@pytest.mark.parametrize("code", sorted(aws._DENIED))
def test_a_refusal_of_aws_is_final(code: str) -> None:
    assert aws._outcome(code) is Outcome.DENIED


# Vault


@pytest.fixture(scope="module")
def server() -> Iterator[VaultServer]:
    with vault_server() as running:
        yield running


def at_vault(path: str, field: str = "openai_key", **more: Any) -> VaultLocator:
    return VaultLocator(provider="vault", path=path, field=field, **more)


async def test_a_field_of_vault_is_read_by_version(server: VaultServer) -> None:
    for text in ("first-text", "second-text"):
        server.put("mcp-use/api-keys", openai_key=text, number=7)
    provider = Vault(server.url, token=server.token())
    assert await provider.read(at_vault("mcp-use/api-keys")) == "second-text"
    assert await provider.read(at_vault("mcp-use/api-keys", version=1)) == "first-text"
    assert await outcome(provider.read(at_vault("mcp-use/api-keys", version=3))) is Outcome.MISSING
    assert await outcome(provider.read(at_vault("mcp-use/api-keys", "other"))) is Outcome.MISSING
    assert await outcome(provider.read(at_vault("mcp-use/api-keys", "number"))) is Outcome.UNUSABLE
    assert await outcome(provider.read(at_vault("none"))) is Outcome.MISSING
    server.admin.secrets.kv.v2.delete_latest_version_of_secret("mcp-use/api-keys")
    assert await outcome(provider.read(at_vault("mcp-use/api-keys"))) is Outcome.MISSING


async def test_a_token_that_travels_in_the_clear_passes_no_proxy(
    server: VaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("mcp-use/plain", openai_key="some-text")
    provider = Vault(server.url, token=server.token())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(requests.exceptions.ProxyError):  # the control: the environment is asked otherwise
        await asyncio.to_thread(requests.get, server.url, timeout=5)
    assert await provider.read(at_vault("mcp-use/plain")) == "some-text"


async def test_a_token_reads_what_its_policy_says_and_while_it_lives(server: VaultServer, tmp_path: Path) -> None:
    server.put("of-us/key", openai_key="our-text")
    server.put("of-others/key", openai_key="their-text")
    token_file = tmp_path / "token"
    token_file.write_text(server.token(ttl="1s", path="of-us/*") + "\n")
    provider = Vault(server.url, token_file=token_file)
    assert await provider.read(at_vault("of-us/key")) == "our-text"
    assert await outcome(provider.read(at_vault("of-others/key"))) is Outcome.DENIED
    assert await Vault(server.url, token=ROOT_TOKEN).read(at_vault("of-others/key")) == "their-text", "the control"
    assert await outcome(Vault(server.url, token="wrong-token").read(at_vault("of-us/key"))) is Outcome.DENIED
    await asyncio.sleep(1.1)
    assert await outcome(provider.read(at_vault("of-us/key"))) is Outcome.DENIED, "it has expired"
    token_file.write_text(server.token(path="of-us/*"))
    assert await provider.read(at_vault("of-us/key")) == "our-text", "its successor is read from the file"


async def test_a_vault_that_is_not_set_up_or_not_there_is_told_as_such(
    server: VaultServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.put("some/key", openai_key="some-text")
    monkeypatch.setenv("VAULT_TOKEN", ROOT_TOKEN)  # hvac would take it, and nobody has said so
    monkeypatch.setenv("VAULT_ADDR", server.url)
    for provider in (Vault(server.url), Vault(None, token=ROOT_TOKEN), Vault(server.url, token_file=tmp_path / "none")):
        assert await outcome(provider.read(at_vault("some/key"))) is Outcome.NOT_CONFIGURED
        assert ROOT_TOKEN not in repr(provider)
    nowhere = Vault(f"http://127.0.0.1:{free_port()}", token=ROOT_TOKEN)
    assert await outcome(nowhere.read(at_vault("some/key"))) is Outcome.UNAVAILABLE


@pytest.mark.parametrize("url", ["http://vault.test", "ftp://127.0.0.1", "vault.test", "http://10.0.0.1:8200"])
def test_a_token_never_travels_in_the_clear(url: str) -> None:
    with pytest.raises(ConfigurationError):
        Vault(url, token="some-token")


# Azure


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyVault]:
    with key_vault(tmp_path_factory.mktemp("azure")) as running:
        yield running


def provider_of(vault: KeyVault, *vaults: str) -> KeyVaults:
    """With the real credential and client of the SDK, told of the test's authorities and addresses."""
    transport = RequestsTransport(connection_verify=str(vault.ca_file))
    credential = ClientSecretCredential(
        "tenant",
        "client",
        "client-secret",
        authority=vault.url,
        disable_instance_discovery=True,
        transport=transport,
    )
    options = {"transport": transport, "verify_challenge_resource": False}
    return KeyVaults(vaults or [vault.url], credential=credential, options=options)


def at_azure(vault: KeyVault, name: str, **more: Any) -> AzureLocator:
    return AzureLocator(provider="azure", vault=vault.url, name=name, **more)


async def test_a_secret_of_key_vault_is_read_by_name_and_version(vault: KeyVault) -> None:
    vault.secrets["openai-api-key"] = ["first-text", "second-text"]
    provider = provider_of(vault)
    assert await provider.read(at_azure(vault, "openai-api-key")) == "second-text"
    assert await provider.read(at_azure(vault, "openai-api-key", version="1")) == "first-text"
    assert await outcome(provider.read(at_azure(vault, "none"))) is Outcome.MISSING
    assert set(vault.tokens) == {"Bearer an-access-token"}


@pytest.mark.parametrize(
    ("status", "expected"), [(403, Outcome.DENIED), (401, Outcome.DENIED), (500, Outcome.UNAVAILABLE)]
)
async def test_what_key_vault_refuses_is_told_apart(vault: KeyVault, status: int, expected: Outcome) -> None:
    vault.secrets["key"] = ["some-text"]
    vault.status = status
    try:
        assert await outcome(provider_of(vault).read(at_azure(vault, "key"))) is expected
    finally:
        vault.status = 0


async def test_no_token_goes_to_a_vault_that_the_operator_has_not_named(vault: KeyVault) -> None:
    vault.secrets["key"] = ["some-text"]
    vault.tokens.clear()
    elsewhere = provider_of(vault, "https://other.vault.test")
    assert await outcome(elsewhere.read(at_azure(vault, "key"))) is Outcome.NOT_CONFIGURED
    assert vault.tokens == []
    assert await provider_of(vault).read(at_azure(vault, "key")) == "some-text", "the control"


async def test_a_vault_asks_for_a_token_of_its_own_domain_or_gets_none(vault: KeyVault) -> None:
    class Eager:
        def get_token(self, *_scopes: str, **_options: Any) -> AccessToken:
            return AccessToken("a-token-of-ours", int(time.time()) + 3600)

    vault.secrets["key"] = ["some-text"]
    vault.tokens.clear()
    transport = RequestsTransport(connection_verify=str(vault.ca_file))
    found = []
    for checks in (True, False):
        options = {"transport": transport, "verify_challenge_resource": checks}
        provider = KeyVaults([vault.url], credential=Eager(), options=options)
        try:
            found.append(await provider.read(at_azure(vault, "key")))
        except Unreadable as error:
            found.append(error.outcome)
    assert found == [Outcome.UNAVAILABLE, "some-text"], "the second is the control"
    assert vault.tokens == ["Bearer a-token-of-ours"]


# What all of them share


@pytest.mark.parametrize(
    ("locator", "library"),
    [
        ({"provider": "aws", "region": REGION, "secret_id": "a"}, "botocore.exceptions"),
        ({"provider": "azure", "vault": "https://a.vault.test", "name": "a"}, "azure.core"),
        ({"provider": "vault", "path": "a", "field": "a"}, "hvac"),
    ],
    ids=["aws", "azure", "vault"],
)
async def test_a_library_that_is_not_installed_is_named_to_the_operator(
    monkeypatch: pytest.MonkeyPatch, locator: dict[str, Any], library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    providers: dict[str, Any] = {
        "aws": SecretsManager(None),
        "azure": KeyVaults(["https://a.vault.test"]),
        "vault": Vault("https://a.vault.test", token="some-token"),
    }
    parsed: Locator = parse(locator["provider"], locator)
    with pytest.raises(Unreadable) as raised:
        await providers[parsed.provider].read(parsed)
    assert raised.value.outcome is Outcome.NOT_CONFIGURED
    assert f"the extra {parsed.provider!r}" in raised.value.detail


def test_no_library_is_imported_before_it_is_used() -> None:
    code = "import sys\nfrom app.secrets.providers import aws, azure, vault\n"
    code += "print([name for name in ('boto3', 'botocore', 'azure', 'hvac') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"
