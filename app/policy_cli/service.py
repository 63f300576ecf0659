"""The service as the command asks it: every way to fail is one line and an exit code, never a traceback."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

# A backtest takes up to a minute, and publishing starts servers.
_TIMEOUT_S: Final = 180
# As large as the service itself reads.
_MAX_BYTES: Final = 1_000_000
_NEWEST: Final = 20


class Stopped(Exception):
    """The command ends: 1 where the answer is no, 2 where there is none. `faults` are (place, message)."""

    def __init__(self, code: int, message: str, faults: list[tuple[str, str]] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.faults = faults or []


class _Unchecked(Stopped):
    """The service wants the version to be checked first."""


class Service:
    """Asks; raises Stopped for whatever is not an answer."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    @property
    def _host(self) -> str:
        """Without what else a URL may hold: a password."""
        return f"{self._client.base_url.scheme}://{self._client.base_url.netloc.decode()}"

    @property
    def stranger(self) -> str:
        """What to say of answers that are none of Bulkhead's."""
        return f"{self._host} does not answer like Bulkhead: is the URL right, is it of this version?"

    def get(self, path: str, **params: Any) -> Any:
        """Ask with those parameters that are not None."""
        return self._ask("GET", path, params={name: value for name, value in params.items() if value is not None})

    def post(self, path: str, body: Any = None, **more: Any) -> Any:
        """Ask with a body in JSON, if there is one."""
        return self._ask("POST", path, **({"json": body} if body is not None else {}), **more)

    def _ask(self, method: str, path: str, **more: Any) -> Any:
        try:
            response = self._client.request(method, path, **more)
            answer = response.json()
        except httpx.HTTPError as error:
            raise Stopped(
                2, f"{self._host} cannot be asked ({type(error).__name__}): is it up, is the URL right?"
            ) from None
        except (ValueError, RecursionError):
            raise Stopped(2, self.stranger) from None
        if not response.is_success:
            raise _refusal(response.status_code, answer)
        return answer

    def version(self, source: str) -> str:
        """The number of a version, `published`, or that of a file's text, which is stored where it is not yet."""
        if source.isdigit() or source == "published":
            return source
        text = read_text(Path(source))
        digest = hashlib.sha256(text.encode()).hexdigest()
        newest = self.get("/v1/policies", limit=_NEWEST)["items"]
        found = next((item for item in newest if item["digest"] == digest), None)
        stored = found or self.post("/v1/policies", content=text.encode())
        return str(stored["version"])

    def of_checked(self, version: str, method: str, path: str, body: Any = None, **params: Any) -> Any:
        """Ask about a version, which is checked first where it never was."""
        where = f"/v1/policies/{version}/{path}"

        def ask() -> Any:
            return self.get(where, **params) if method == "GET" else self.post(where, body)

        try:
            return ask()
        except _Unchecked:
            self.post(f"/v1/policies/{version}/check")
            return ask()


def _refusal(status: int, problem: Any) -> Stopped:
    """Exit 2 for who may not ask, and for what is not there to answer."""
    if not isinstance(problem, dict):
        return Stopped(2, f"The service answered with status {status}.")
    code = str(problem.get("code", status))
    kind = _Unchecked if code == "version_unchecked" else Stopped
    faults = [(fault["path"], fault["message"]) for fault in problem.get("errors") or []]
    return kind(1 if status in {404, 409, 422} else 2, f"{problem.get('detail', '')} ({code})", faults)


def read_text(path: Path) -> str:
    """A document; raise Stopped where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise Stopped(2, f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > _MAX_BYTES:
        raise Stopped(1, f"{path} is larger than {_MAX_BYTES} bytes.")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Stopped(1, f"{path} is not UTF-8.") from None


@contextmanager
def connected(url: str | None, key: str | None) -> Iterator[Service]:
    """The service at this URL, asked with this key."""
    if not url or not key:
        raise Stopped(2, "Export BULKHEAD_URL (or give --url) and BULKHEAD_ADMIN_KEY: where it is, and who asks.")
    if not url.lower().startswith(("http://", "https://")):
        raise Stopped(2, "BULKHEAD_URL must begin with http:// or https://.")
    try:
        client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=_TIMEOUT_S)
    except (httpx.InvalidURL, ValueError):
        raise Stopped(2, "The URL, or the key, is not one.") from None
    with client:
        yield Service(client)
