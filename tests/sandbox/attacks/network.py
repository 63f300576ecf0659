"""Ways out over the network, or to a socket on this machine."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from .calls import Ground, attack, attack_where

_BESIDE = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, 40, socket.AF_ALG}
_METADATA = "169.254.169.254"
_MPTCP = 262


@attack
def connect_to_a_host_port(ground: Ground) -> None:
    socket.create_connection(("127.0.0.1", ground["tcp"]), timeout=2).close()


@attack
def connect_to_a_host_port_by_its_first_byte(ground: Ground) -> None:
    """A message that makes the connection: nothing ever calls connect."""
    client = socket.socket()
    client.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", ground["tcp"]))


@attack_where("the kernel's configuration")
def connect_to_a_host_port_by_many_paths(ground: Ground) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _MPTCP)
    client.settimeout(2)
    client.connect(("127.0.0.1", ground["tcp"]))


@attack
def connect_to_a_host_port_by_the_address_of_nowhere(ground: Ground) -> None:
    socket.create_connection(("0.0.0.0", ground["tcp"]), timeout=2).close()  # noqa: S104  # the loopback's other name


@attack
def connect_to_a_host_port_without_waiting(ground: Ground) -> None:
    client = socket.socket()
    client.setblocking(False)
    client.connect_ex(("127.0.0.1", ground["tcp"]))
    client.setblocking(True)
    client.settimeout(2)
    client.send(b"x")


@attack_where("the machine: it has IPv6")
def connect_to_a_host_port_by_ipv6(ground: Ground) -> None:
    socket.create_connection(("::1", ground["tcp6"]), timeout=2).close()


@attack_where("the machine: it has IPv6")
def connect_to_a_host_port_by_a_mapped_address(ground: Ground) -> None:
    socket.create_connection(("::ffff:127.0.0.1", ground["tcp"]), timeout=2).close()


@attack_where("root, who gives the machine such an address", is_apart=True)
def connect_to_the_metadata_address(ground: Ground) -> None:
    socket.create_connection((_METADATA, int(ground["elsewhere"])), timeout=2).close()


@attack_where("root, who gives the machine such an address", is_apart=True)
def connect_to_an_address_of_the_hosts_network(ground: Ground) -> None:
    socket.create_connection((ground["lan"], int(ground["elsewhere"])), timeout=2).close()


@attack_where("root, who gives the machine such an address", is_apart=True)
def send_a_datagram_to_the_hosts_network(ground: Ground) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(1)
    client.sendto(b"ping", (ground["lan"], int(ground["elsewhere"])))
    client.recvfrom(16)


@attack
def listen_where_the_host_connects(ground: Ground) -> None:
    server = socket.create_server(("127.0.0.1", ground["lure"]))
    server.settimeout(1)
    server.accept()


@attack
def exchange_datagrams_with_the_host(ground: Ground) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(1)
    client.sendto(b"ping", ("127.0.0.1", ground["udp"]))
    client.recvfrom(16)


@attack
def ask_a_name_server(ground: Ground) -> None:
    question = b"\0\1\1\0\0\1\0\0\0\0\0\0\7secrets\4evil\4test\0\0\x10\0\1"[:16]
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(1)
    client.connect(("127.0.0.1", ground["udp"]))
    client.sendmsg([question])
    client.recvmsg(512)


@attack
def connect_to_an_abstract_unix_socket(ground: Ground) -> None:
    socket.socket(socket.AF_UNIX).connect("\0" + ground["abstract"])


@attack
def connect_to_a_unix_socket_in_my_workspace(ground: Ground) -> None:
    socket.socket(socket.AF_UNIX).connect(ground["workspace"] + "/host.sock")


@attack
def send_a_datagram_to_a_unix_socket_in_my_workspace(ground: Ground) -> None:
    # A pair is connected to itself; for datagrams, that keeps nobody from naming another address.
    socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", ground["workspace"] + "/datagrams.sock")


@attack
def turn_a_pair_to_a_unix_socket_in_my_workspace(ground: Ground) -> None:
    mine = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
    mine.connect(ground["workspace"] + "/datagrams.sock")
    mine.send(b"x")


@attack
def leave_a_unix_socket_in_my_workspace(ground: Ground) -> None:
    path = Path(ground["workspace"], "mine.sock")
    path.unlink(missing_ok=True)
    socket.socket(socket.AF_UNIX).bind(str(path))


@attack
def use_a_socket_that_was_left_open(ground: Ground) -> None:
    for number in range(3, 4096):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                return
        except OSError:
            continue
    raise FileNotFoundError


@attack_where("the kernel's configuration")
def open_a_vsock(ground: Ground) -> None:
    socket.socket(40, socket.SOCK_STREAM)


@attack
def open_a_netlink_socket(ground: Ground) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)


@attack_where("the kernel's configuration")
def open_a_socket_of_the_kernels_crypto(ground: Ground) -> None:
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)


@attack_where("a capability")
def open_a_raw_socket(ground: Ground) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


@attack_where("a capability")
def open_a_packet_socket(ground: Ground) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300)


@attack_where("the kernel's settings: which groups may")
def ping_the_host(ground: Ground) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    client.settimeout(1)
    client.sendto(b"\x08\0\xf7\xfd\0\1\0\1", ("127.0.0.1", 0))
    client.recvfrom(64)


@attack_where("the kernel's configuration")
def open_a_socket_of_a_rarer_family(ground: Ground) -> None:
    for family in set(range(2, 46)) - _BESIDE:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW):
            try:
                return socket.socket(family, kind).close()
            except OSError:
                continue
    raise PermissionError
