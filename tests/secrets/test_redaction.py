"""What no model, caller or admin may read of a secret, wherever it stands; and what passes."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable
from urllib.parse import quote, quote_plus
from uuid import UUID, uuid4

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from app.runs.redaction import Redactor
from app.secrets import known as known_texts
from app.secrets.known import LONGEST, KnownTexts, forms
from tests.secrets.ground import Ground, resolve, write
from tests.service import DEFAULT_MODEL_POLICY

TENANT = uuid4()
PRINTED = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=8, max_size=60)


def redacted(secret: str, said: str) -> str:
    known = KnownTexts()
    known.add(TENANT, secret)
    return known.redact(TENANT, said)


@given(secret=PRINTED, before=st.binary(max_size=7), after=st.binary(max_size=7))
@settings(max_examples=150, deadline=None)
def test_no_spelling_of_a_text_is_left(secret: str, before: bytes, after: bytes) -> None:
    spelled = [
        secret,
        json.dumps(secret),
        json.dumps({"key": [secret]}, ensure_ascii=False),
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
    ]
    for said in spelled:
        assert said.strip('"') not in redacted(secret, f"a {said} b") or "[redacted]" in said
    whole = before + secret.encode() + after
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert "[redacted]" in redacted(secret, encode(whole).decode())


@pytest.mark.parametrize("user", ["a", "ab", "abc"])
def test_a_basic_header_is_found_whatever_its_user_is_called(user: str) -> None:
    header = base64.b64encode(f"{user}:correct-horse-battery".encode()).decode()
    assert redacted("correct-horse-battery", f"Authorization: Basic {header}").count("[redacted]") == 1


def test_the_password_in_a_url_is_a_secret_too() -> None:
    dsn = "postgresql://reader:p%40ss-word-1@db.test/reports"
    told = redacted(dsn, f'password "p@ss-word-1" or "p%40ss-word-1" refused for reader at {dsn}')
    assert told == 'password "[redacted]" or "[redacted]" refused for reader at [redacted]'


def test_a_text_inside_another_leaves_no_rest_of_it() -> None:
    known = KnownTexts()
    for text in ("secret", "secret-and-more"):
        known.add(TENANT, text)
    assert known.redact(TENANT, "secret-and-more secret") == "[redacted] [redacted]"


@pytest.mark.parametrize(
    "said", ["swordfi sh-9000", "9000-hsifdrows", "SWORDFISH-9000", "73776f7264666973682d39303030"]
)
def test_what_the_documents_say_passes_passes(said: str) -> None:
    assert redacted("swordfish-9000", said) == said


def test_a_text_too_short_to_find_is_left_alone() -> None:
    assert redacted("admin", "the admin") == "the admin"


def test_old_texts_stay_known_and_their_number_is_bounded() -> None:
    known = KnownTexts()
    for number in range(300):
        known.add(TENANT, f"text-number-{number:04}")
    assert known.redact(TENANT, "text-number-0299 text-number-0050") == "[redacted] [redacted]"
    assert known.redact(TENANT, "text-number-0049") == "text-number-0049"
    assert "text" not in repr(known)


def all_replaced(texts: list[str], said: str) -> str:
    """What redaction means, looked up form by form."""
    for form in sorted({form for text in texts for form in forms(text)}, key=lambda form: (-len(form), form)):
        said = said.replace(form, "[redacted]")
    return said


@given(
    texts=st.lists(st.text("xyé", min_size=6, max_size=9), min_size=1, max_size=6),
    said=st.text("xyé", max_size=60),
    many=st.sampled_from([3, 1_000]),
)
@settings(max_examples=300, deadline=None)
def test_looking_for_all_at_once_finds_what_looking_for_each_finds(texts: list[str], said: str, many: int) -> None:
    """Of two letters, so that they overlap; also where more is found than is looked at one by one."""
    known = KnownTexts()
    for text in texts:
        known.add(TENANT, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_texts, "_MANY", many)
        assert known.redact(TENANT, f"{said} {texts[0]}") == all_replaced(texts, f"{said} {texts[0]}")


def quickest(work: Callable[[], object]) -> float:
    """In seconds, of five times."""

    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return min(once() for _ in range(5))


def test_redaction_costs_little_however_many_secrets_a_tenant_has() -> None:
    """On 64 KB without any, with one, and with as much as possible of what is looked for. Control: form by form."""
    texts = [f"postgresql://reader:{secrets.token_urlsafe(16)}@db{number}.test/reports" for number in range(250)]
    known = KnownTexts()
    for text in texts:
        known.add(TENANT, text)
    plain = "postgresql://reader: is how they begin. "[:40] * 1_600
    hostile = known_texts._core(texts[0]).decode() * 10_000
    said = {"none": plain, "one": plain + texts[7], "hostile": hostile}
    costs = {name: quickest(lambda text=text: known.redact(TENANT, text)) for name, text in said.items()}  # type: ignore[misc]  # bound at once
    each = quickest(lambda: all_replaced(texts, plain))
    assert known.redact(TENANT, said["one"]) == f"{plain}[redacted]"
    assert costs["none"] * 20 < each
    assert costs["one"] * 10 < each
    assert costs["hostile"] < each


@pytest.mark.parametrize("is_json", [False, True])
def test_of_a_long_text_no_beginning_of_a_secret_is_left_where_the_search_ends(*, is_json: bool) -> None:
    """Before it are so many that what is left of the last one moves to where it would be read: that is the control."""
    secret = "\x01" * 200 + "pineapple"
    said = json.dumps(secret)[1:-1] if is_json else secret
    known = KnownTexts()
    known.add(TENANT, secret)
    redactor = Redactor([], of_tenant=known.redact)
    most = 5_000
    for cut in range(12, len(said), 97):
        before = most + LONGEST - cut
        text = (secret * (before // len(secret))).ljust(before, ".") + said + "."
        assert said[:12] in known.redact(TENANT, text[: most + LONGEST])[:most]
        assert said[:12] not in redactor.beginning(TENANT, text, most=most)
    assert redactor.beginning(TENANT, "a" * 4_999 + secret, most=most) == "a" * 4_999 + "["


# On its way through a run


@pytest.mark.parametrize("is_redacting", [True, False], ids=["attack", "control"])
async def test_a_secret_that_a_tool_reads_reaches_neither_model_nor_caller_nor_admin(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, *, is_redacting: bool
) -> None:
    """It lies in a file that has it for a name, too: the tool gives it out, its server writes it to its stderr, and
    the model, which was told the name, repeats it. Control: all of them are seen to say it.
    """
    value = f"v{secrets.token_hex(12)}"
    if not is_redacting:
        monkeypatch.setattr(KnownTexts, "redact", lambda _self, _tenant_id, text: text)
    tenant = await ground.service.new_tenant(files={f"{value}.md": f"The key is {value}."})
    await write(tenant, "key", value)
    await resolve(ground.store, tenant, "key")
    asked = (await tenant.user.ask(f"What does {value}.md say?")).json()
    stderr = (await tenant.admin.get("/v1/servers/docs/stderr")).text
    kept = (await tenant.user.get(f"/v1/runs/{asked['run_id']}")).json()["answer"]
    assert [value in text for text in (asked["answer"], kept, stderr)] == [not is_redacting] * 3
    assert value not in json.dumps(await tenant.admin.events())


@pytest.mark.parametrize("is_resolved", [True, False], ids=["attack", "control"])
async def test_an_answer_that_has_the_secret_from_elsewhere_is_redacted_too(
    ground: Ground, *, is_resolved: bool
) -> None:
    """No tool was called, so only the answer's own redaction can hold. Control: a text that is no secret in use."""
    value = f"v{secrets.token_hex(12)}"
    tenant = await ground.service.new_tenant(policy=DEFAULT_MODEL_POLICY)
    await write(tenant, "key", value)
    if is_resolved:
        await resolve(ground.store, tenant, "key")
    ground.model.state.reset()
    ground.model.says(f"It is {value}.")
    asked = (await tenant.user.ask("What is the key?")).json()
    kept = (await tenant.user.get(f"/v1/runs/{asked['run_id']}")).json()["answer"]
    said = "It is [redacted]." if is_resolved else f"It is {value}."
    assert (asked["answer"], kept, asked["tool_calls"]) == (said, said, [])


async def test_a_tenants_secret_is_an_ordinary_word_to_another(ground: Ground) -> None:
    first, second = await ground.new_tenant(), await ground.new_tenant()
    await write(first, "key", "pineapple-seven")
    await resolve(ground.store, first, "key")
    redact = Redactor(["of-the-platform"], of_tenant=ground.store.redact).for_tenant
    said = "pineapple-seven of-the-platform"
    assert redact(UUID(first.id), said) == "[redacted] [redacted]"
    assert redact(UUID(second.id), said) == "pineapple-seven [redacted]"


async def test_a_line_of_the_log_that_names_the_tenant_holds_no_text_of_its(
    ground: Ground, capfd: pytest.CaptureFixture[str]
) -> None:
    value = f"v{secrets.token_hex(12)}"
    tenant = await ground.new_tenant()
    await write(tenant, "key", value)
    await resolve(ground.store, tenant, "key")
    log = structlog.get_logger()
    log.error("odd", tenant_id=tenant.id, detail=f"it said {value}", exception=f"Traceback ... LookupError: {value}")
    assert value not in "".join(capfd.readouterr())
    log.warning("odd", detail=f"it said {value}")
    assert value in "".join(capfd.readouterr()), "the control: nobody says whose line it is"
