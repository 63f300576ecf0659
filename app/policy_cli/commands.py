"""`bulkhead policy validate|diff|dry-run|backtest|publish|rollback|explain`.

Exit codes: 0 yes; 1 the answer is no (faults, a refusal, a call that is denied or has to wait for an approval, a
flip); 2 there is no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from app.policy_cli.service import Service, Stopped, connected, read_text
from app.policy_cli.tables import Screen, shown, standing

policy: Final = typer.Typer(
    no_args_is_help=True,
    help="Policies: check, compare, try and publish them. The service is at BULKHEAD_URL; who asks is in"
    " BULKHEAD_ADMIN_KEY, or else BULKHEAD_API_KEY.",
)

Url = Annotated[str | None, typer.Option(envvar="BULKHEAD_URL", help="Where the service is.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar=["BULKHEAD_ADMIN_KEY", "BULKHEAD_API_KEY"],
        hidden=True,
        help="Others may see it on a command line.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="The service's answer as it is.")]
Source = Annotated[str, typer.Argument(help="A version, `published`, or a file, which is stored as a draft.")]
Accept = Annotated[
    bool, typer.Option("--accept-tool-changes", help="Also where servers that are declared as before changed tools.")
]
Revoke = Annotated[bool, typer.Option("--revoke-running", help="Runs in flight end.")]


@contextmanager
def _screen(*, as_json: bool) -> Iterator[Screen]:
    screen = Screen(as_json=as_json)
    try:
        yield screen
    except Stopped as stopped:
        screen.complain(str(stopped))
        screen.complaints(stopped.faults)
        raise typer.Exit(stopped.code) from None


@contextmanager
def _asking(url: str | None, key: str | None, *, as_json: bool) -> Iterator[tuple[Screen, Service]]:
    with _screen(as_json=as_json) as screen, connected(url, key) as service:
        try:
            yield screen, service
        except (LookupError, TypeError, AttributeError, ValueError):  # an answer that is JSON, and not what we know
            raise Stopped(2, service.stranger) from None


@policy.command()
def validate(file: Annotated[Path, typer.Argument(help="A policy document.")], *, as_json: AsJson = False) -> None:
    """Tell the faults of a document; works without a service, which alone knows the models and the tools."""
    with _screen(as_json=as_json) as screen:
        faults, warnings = _read(read_text(file))
        told = [{"path": place, "message": message} for place, message in faults]
        if screen.answer({"valid": not faults, "errors": told, "warnings": warnings}):
            raise typer.Exit(1 if faults else 0)
        if faults:
            raise Stopped(1, f"{file} is not a valid policy.", faults)
        screen.say(f"{file} has no fault of its own.", "green")
        screen.warn(warnings)


def _read(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Its faults and its warnings."""
    from app.policies import advice  # noqa: PLC0415  takes a while, which no other shall wait
    from app.policies.document import PolicyInvalid, parse  # noqa: PLC0415  as above
    from app.policies.engine import rule_faults  # noqa: PLC0415  as above

    try:
        document = parse(text)
        faults, warnings = rule_faults(document), advice.warnings(document)
    except PolicyInvalid as error:
        faults, warnings = list(error.faults), []
    return [(fault.path, fault.message) for fault in faults], warnings


@policy.command()
def diff(
    source: Source,
    against: Annotated[str, typer.Option(help="A version, or `published`.")] = "published",
    *,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show which keys differ, and what that means for who can call what."""
    with _asking(url, key, as_json=as_json) as (screen, service):
        version = service.version(source)
        found = service.get(f"/v1/policies/{version}/diff", against=against)
        if found["access"] is None:
            for number in found["unchecked"]:
                service.post(f"/v1/policies/{number}/check")
            found = service.get(f"/v1/policies/{version}/diff", against=against)
        if not screen.answer(found):
            _show_diff(screen, found)


def _show_diff(screen: Screen, found: Any) -> None:
    screen.say(f"From version {found['against']} to version {found['version']}:", "bold")
    if not found["keys"]:
        screen.say("No key differs.")
        return
    screen.table(("key", "", "before", "after"), [tuple(each.values()) for each in _keys(found)])
    rows = [
        (each["role"], each["tool"], standing(each["before"]), standing(each["after"]), each["direction"])
        for each in found["access"]
    ]
    screen.say(f"\nWho can call what: {len(rows) or 'no'} changes.")
    if rows:
        screen.table(("role", "tool", "before", "after", ""), rows)


def _keys(found: Any) -> list[dict[str, Any]]:
    return [{name: each[name] for name in ("path", "kind", "before", "after")} for each in found["keys"]]


@policy.command()
def dry_run(
    source: Source,
    *,
    role: Annotated[str | None, typer.Option(help="Anybody of this role (tenant_admin, auditor, user), or")] = None,
    user: Annotated[str | None, typer.Option(help="this user, by the id.")] = None,
    query: Annotated[str | None, typer.Option(help="A query to be screened.")] = None,
    calls: Annotated[
        Path | None, typer.Option(help='A file with calls to be decided: [{"tool": ..., "arguments": {...}}].')
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Ask what a version would say to a query, or to tool calls, of a role or a user; nothing is called."""
    with _asking(url, key, as_json=as_json) as (screen, service):
        if not role and not user:
            raise Stopped(2, "Give --role or --user: who would ask.")
        body: dict[str, Any] = {"as": {name: value for name, value in (("role", role), ("user_id", user)) if value}}
        body |= {"query": query} if query is not None else {}
        body |= {"calls": _read_calls(calls)} if calls is not None else {}
        found = service.of_checked(service.version(source), "POST", "dry-run", body)
        if not screen.answer(found):
            _show_dry_run(screen, found)
        stopped = [call for call in found["calls"] or () if call["decision"] != "allowed"]
        if stopped or (found["screening"] and not found["screening"]["allowed"]):
            raise typer.Exit(1)


def _read_calls(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise Stopped(2, f"{path} is not JSON.") from None


def _show_dry_run(screen: Screen, found: Any) -> None:
    screen.say(f"Version {found['version']}, with the tools found at {found['checked_at']}:", "bold")
    if found["calls"] is not None:
        columns = ("tool", "decision", "rule", "reason")
        screen.table(columns, [tuple(call[name] for name in columns) for call in found["calls"]])
        return
    screening = found["screening"]
    verdict = "is let in" if screening["allowed"] else f"is refused by {screening['rule']}"
    noted = f"; noted: {', '.join(screening['flags'])}" if screening["flags"] else ""
    screen.say(f"The query {verdict}{noted}.", "green" if screening["allowed"] else "red")
    screen.table(("tool that the model sees", "access"), [(each["tool"], standing(each)) for each in found["tools"]])


@policy.command()
def backtest(
    source: Source,
    *,
    since: Annotated[str | None, typer.Option(help="Only calls from then on: 2026-01-31T00:00:00Z.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many of the newest calls.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Replay a version over the calls that were really made, and show each that it would decide otherwise."""
    with _asking(url, key, as_json=as_json) as (screen, service):
        body = {name: value for name, value in (("since", since), ("limit", limit)) if value is not None}
        found = service.of_checked(service.version(source), "POST", "backtest", body)
        if not screen.answer(found):
            _show_backtest(screen, found)
        if found["flipped"]:
            raise typer.Exit(1)


def _show_backtest(screen: Screen, found: Any) -> None:
    title = (
        f"Version {found['version']} instead of {found['against']}: of {found['calls']} calls {found['flipped']} flip."
    )
    screen.say(title, "bold red" if found["flipped"] else "bold green")
    for reason, count in found["skipped"].items():
        screen.say(f"{count} calls could not be replayed: {reason}.", "yellow")
    if not found["is_full"]:
        screen.say("Not all that is recorded was replayed: this does not stand for publishing.", "yellow")
    if found["flips"]:
        heads = ("user", "role", "tool", "before", "after", "calls", "example")
        screen.table(heads, [_flip(each) for each in found["flips"]])


def _flip(each: Any) -> tuple[Any, ...]:
    before, after = (f"{each[f'decision_{when}']} ({each[f'rule_{when}']})" for when in ("before", "after"))
    example = f"{each['example']['run_id']}/{each['example']['sequence']}"
    return each["user_id"], each["role"], each["tool"], before, after, each["count"], example


@policy.command()
def publish(
    source: Source,
    *,
    revoke_running: Revoke = False,
    accept_tool_changes: Accept = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a version hold, or tell all that keeps it from that."""
    with _asking(url, key, as_json=as_json) as (screen, service):
        version = service.version(source)
        body = {"revoke_running": revoke_running, "accept_tool_changes": accept_tool_changes}
        _show_held(screen, service.post(f"/v1/policies/{version}/publish", body))


@policy.command()
def rollback(
    to: Annotated[int | None, typer.Option(help="A version that has held; without it, the one before.")] = None,
    *,
    revoke_running: Revoke = False,
    accept_tool_changes: Accept = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make the version hold that held before, with the same checks as publishing."""
    with _asking(url, key, as_json=as_json) as (screen, service):
        body = {"to": to, "revoke_running": revoke_running, "accept_tool_changes": accept_tool_changes}
        _show_held(screen, service.post("/v1/policies/rollback", body))


def _show_held(screen: Screen, held: Any) -> None:
    if not screen.answer(held):
        screen.say(f"Version {held['version']} holds; {held['revoked_runs']} runs were ordered to stop.", "green")
        screen.warn(held["warnings"])


@policy.command()
def explain(
    source: Source = "published",
    *,
    role: Annotated[str | None, typer.Option(help="Anybody of this role.")] = None,
    user: Annotated[str | None, typer.Option(help="A user's id.")] = None,
    tool: Annotated[str | None, typer.Option(help="Only this tool.")] = None,
    call: Annotated[str | None, typer.Option(help="RUN_ID/SEQUENCE: why was this call decided so?")] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show who can call what and by which rules; or why one call was decided so."""
    with _asking(url, key, as_json=as_json) as (screen, service):
        if call is not None:
            run_id, _, sequence = call.partition("/")
            found = service.get(f"/v1/runs/{run_id}/tool_calls/{sequence}/explain")
        else:
            version = service.version(source)
            found = service.of_checked(version, "GET", "explain", role=role, user_id=user, tool=tool)
        if not screen.answer(found):
            _show_call(screen, found) if call is not None else _show_access(screen, found)


def _show_access(screen: Screen, found: Any) -> None:
    screen.say(f"Version {found['version']}, with the tools found at {found['checked_at']}:", "bold")
    rows = [(each["user_id"] or each["role"], each["tool"], standing(each)) for each in found["entries"]]
    screen.table(("who", "tool", "access"), rows)
    texts = [(rule, text) for rule, text in found["texts"].items() if text]
    if texts:
        screen.say("")
        screen.table(("rule", "says"), texts)


def _show_call(screen: Screen, found: Any) -> None:
    then, now = found["recorded"], found["now"]
    screen.say(f"{found['tool']}, asked for by {found['user_id']} ({found['role']}) at {found['made_at']}:", "bold")
    rows = [(f"then, version {then['policy_version']}", then["decision"], then["rule"], then["text"])]
    if now:
        rows.append((f"now, version {now['policy_version']}", now["decision"], now["rule"], now["text"]))
    screen.table(("", "decision", "rule", "says"), rows)
    if now is None:
        screen.say(f"What would be decided now cannot be told: {shown(found['unreadable'])}.", "yellow")
        return
    screen.say(f"{now['reason']} Rules that hold on this call now:")
    screen.table(("rule", "effect", "says"), [(each["rule"], each["effect"], each["text"]) for each in now["firing"]])
