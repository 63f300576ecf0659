"""How the peers are asked: latency counts from when a request was due, and an answer must come from the tool."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import psutil
import pytest

from benchmarks.peers.measuring import Asker, Load, asker
from benchmarks.peers.systems import System
from benchmarks.subjects import Documents

SERVED_S: Final = 0.05
Answer = Callable[[str], tuple[int, str]]


@contextmanager
def system(answer: Answer, journal: Path, *, calls: int = 1) -> Iterator[System]:
    """One that serves one request after the other, and says so many times that its tool was called."""
    turn = threading.Lock()
    journal.touch()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["question"]
            name = question.removeprefix("What does ").removesuffix(" say?")
            with turn:
                time.sleep(SERVED_S)
                line = {"seq": 1, "tool": "read_file", "paths": [name], "outcome": "ok"}
                with journal.open("a") as file:
                    file.write(f"{json.dumps(line)}\n" * calls)
            status, text = answer(name)
            body = json.dumps({"answer": text}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield System(
                name="served",
                process=psutil.Process(),
                url=f"http://127.0.0.1:{server.server_address[1]}/",
                body=lambda question: json.dumps({"question": question}),
                answer=lambda reply: str(reply["answer"]),
                journals=(journal,),
            )
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def documents() -> Documents:
    return Documents()


@pytest.fixture(scope="module")
def client(documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with asker(tmp_path_factory.mktemp("asker"), documents) as found:
        yield found


def test_a_request_that_waits_for_others_is_as_late_as_its_asker_would_say(
    client: Asker, documents: Documents, tmp_path: Path
) -> None:
    with system(lambda name: (200, documents.texts[name]), tmp_path / "journal") as served:
        alone = client.measure(served, Load(callers=1), seconds=0.3)
        flooded = client.measure(served, Load(rate=4 / SERVED_S), seconds=0.25)
    assert alone.block.p50_ms < 4000 * SERVED_S
    assert flooded.asked == 20
    # The last one was due after 0.25 s, and the nineteen before it took 0.95 s; a caller who waits would see 0.05 s.
    assert flooded.block.p99_ms > 1000 * (20 * SERVED_S - 0.25) > 10 * 1000 * SERVED_S
    assert flooded.errors == alone.errors == ()


def test_callers_ask_so_many_at_once(client: Asker, documents: Documents, tmp_path: Path) -> None:
    with system(lambda name: (200, documents.texts[name]), tmp_path / "journal") as served:
        found = client.measure(served, Load(callers=4), seconds=0.3)
    assert found.asked >= 4
    assert found.block.p50_ms > 3 * 1000 * SERVED_S


def test_an_answer_that_does_not_quote_its_file_ends_the_comparison(
    client: Asker, documents: Documents, tmp_path: Path
) -> None:
    answer = documents.texts["note-1.md"]
    with (
        system(lambda _: (200, answer), tmp_path / "journal") as served,
        pytest.raises(AssertionError, match=r"note-0\.md: # Note 1"),
    ):
        client.measure(served, Load(callers=1), seconds=0.1)


@pytest.mark.parametrize(("calls", "fault"), [(0, "calls missing"), (2, "calls that nobody asked for")])
def test_an_answer_without_its_call_or_with_another_ends_the_comparison(
    client: Asker, documents: Documents, tmp_path: Path, calls: int, fault: str
) -> None:
    with (
        system(lambda name: (200, documents.texts[name]), tmp_path / "journal", calls=calls) as served,
        pytest.raises(AssertionError, match=fault),
    ):
        client.measure(served, Load(callers=1), seconds=0.1)


def test_a_refusal_is_an_error_and_no_answer(client: Asker, documents: Documents, tmp_path: Path) -> None:
    def answer(name: str) -> tuple[int, str]:
        return (200, documents.texts[name]) if name == "note-0.md" else (503, "busy")

    with system(answer, tmp_path / "journal") as served:
        found = client.measure(served, Load(rate=20), seconds=0.2)
    assert (found.asked, len(found.errors), len(found.block.walls_s)) == (4, 3, 1)
    assert found.figures()["an_error"].startswith("503")
