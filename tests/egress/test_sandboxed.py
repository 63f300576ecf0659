"""The whole way: a program in the real sandbox, its doors, the real relay, a host outside."""

from __future__ import annotations

import asyncio

from app.outbound.grants import Forward, Grant, Proxy, Reverse
from app.sandbox.contract import Network
from app.servers.leases import Closed, Event
from app.servers.relay import EgressRelay
from tests.egress.stage import LOOPBACK, settled
from tests.outbound.origin import NAME, Origin
from tests.sandbox.programs import backend, profile, run

LISTEN = (("127.0.0.1", 3128), ("127.0.0.2", 80), ("127.0.0.3", 443))
INSIDE = """
import socket, sys
def ask(address, text):
    with socket.create_connection(address, timeout=10) as end:
        end.sendall(text.replace("\\n", "\\r\\n").encode())
        end.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: end.recv(65536), b"")).decode().splitlines()
name, port = sys.argv[1:]
hello = "GET /hello HTTP/1.1\\nHost: x\\n\\n"
print(ask(("127.0.0.1", 3128), f"CONNECT {name}:{port} HTTP/1.1\\nHost: x\\n\\n{hello}")[-1])
print(ask(("127.0.0.1", 3128), f"CONNECT other.test:{port} HTTP/1.1\\nHost: x\\n\\n")[0])
print(ask(("127.0.0.2", 80), hello)[-1])
print(ask(("127.0.0.3", 443), hello)[-1])
try:
    ask(("127.0.0.1", int(port)), hello)
except OSError as error:
    print(error.strerror)
"""


async def test_a_sandboxed_program_reaches_its_hosts_through_its_doors_and_nothing_beside_them(
    relay: EgressRelay, plain: Origin, secure: Origin
) -> None:
    events: list[Event] = []

    async def record(event: Event) -> None:
        events.append(event)

    kinds = (
        Proxy(((NAME, plain.port),)),
        Forward(NAME, plain.port),
        Reverse(NAME, secure.port, (("Authorization", "Bearer secret"),)),
    )
    lease = await relay.grant(Grant("tenant", kinds, private_networks=LOOPBACK), record=record, on_lost=lambda: None)
    network = Network(lease.channel, LISTEN)
    launch = backend("bubblewrap").launch(profile("-c", INSIDE, NAME, str(plain.port), network=network))
    try:
        ran = await asyncio.to_thread(run, launch)
        lease.handed_over()
        await settled(lambda: sum(isinstance(event, Closed) for event in events) == 3)
    finally:
        await lease.release()
    expected = ["hello", "HTTP/1.1 403 Forbidden", "hello", "hello", "Connection refused"]
    assert ran.stdout.splitlines() == expected, ran.stderr
    assert secure.requests[0]["authorization"] == "bearer secret"
