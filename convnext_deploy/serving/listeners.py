"""Sockets that listen: whose an address is, from when on they take connections, and until when."""

import contextlib
import ctypes
import errno
import ipaddress
import socket
import struct
import sys
from typing import Any

from ..arguments import shown
from ..errors import UsageError, plain

BACKLOG = 2048
SO_ATTACH_FILTER = 26  # of linux/socket.h, on all machines that Python runs on but PA-RISC and SPARC


def bound(
    host: str, port: int, option: str, *, shared: bool = False, beside: socket.socket | None = None
) -> socket.socket:
    """A socket that has the address, and does not listen yet. Another server that begins meanwhile cannot have it.

    Args:
        shared: from now on other processes of this user may listen on it through sockets of their own, as the workers
            do. Whoever begins as this one did is refused all the same.
        beside: a socket of this server for other purposes, whose address this must not be.

    Raises:
        UsageError: the address is taken, or none of this machine's, or that of `beside`.
    """
    if not 0 <= port < 2**16:
        raise UsageError(f"{option} {shown(host)}, {shown(port)}; expected a port from 0 to 65535")
    where = host_port(shown(host)[1:-1], port)
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if beside is not None and _overlap(address, beside.getsockname()):
            raise UsageError(f"{option} {where} is where requests are answered already; choose another port")
        made = socket.socket(family, kind, proto)
        try:
            _bind(made, address)
            if shared:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except BaseException:
            made.close()
            raise
    except UnicodeError:  # of a name that the domain name system cannot have
        raise UsageError(f"{option} {shown(host)} is no host's name; expected one, or an address") from None
    except OSError as error:
        raise UsageError(f"{option} {where} cannot be listened on: {plain(error)}; {_cure(option, error)}") from None
    return made


def _cure(option: str, error: OSError) -> str:
    """Which option to give otherwise: the port where another program has it, the host where it is none of ours."""
    if error.errno not in (errno.EADDRINUSE, errno.EACCES):  # the latter of ports below 1024
        return "give another --host" if option != "admin" else "give another --admin"
    if option == "admin":
        return "give --admin another port"
    return f"give another {'--port' if option == 'the address' else option}, or 0 for a free one"


def _bind(made: socket.socket, address: tuple[Any, ...]) -> None:
    """Take an address that nobody else has, whether or not they listen on it yet."""
    try:
        made.bind(address)
        return
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    # It is taken, or connections of a server that has just ended are left. SO_REUSEADDR looks past these, and past
    # another server that opens its artifacts and does not listen yet. Only one of two can listen, so that decides.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
    if sys.platform == "linux":  # elsewhere a socket that has listened cannot be taken back
        made.listen(1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        made.shutdown(socket.SHUT_RD)  # clients are refused until the server is ready; the port stays


def listen(made: socket.socket) -> None:
    """Take connections on a socket of `bound`; they wait until a server accepts them."""
    # It looks past the connections of a server that has ended, and these inherit it for the next one. No other socket
    # can be bound between the two lines and listen too.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.listen(BACKLOG)


def refuse(made: socket.socket) -> None:
    """Take no new connection on a socket that listens, and keep those that are made or half made.

    Otherwise a client that connects between the last `accept` and the end of listening would be reset with its request
    under way. Its first packet is dropped instead; it comes again a second later, and is refused then.
    """
    if sys.platform == "linux":
        # Instructions of linux/filter.h: load the flags, byte 13 of a TCP header (RFC 9293). A packet with SYN
        # goes to the first return, which drops it, and another to the second, which keeps it whole.
        code = struct.pack("HBBI" * 4, 0x30, 0, 0, 13, 0x45, 0, 1, 0x02, 0x06, 0, 0, 0, 0x06, 0, 0, 2**32 - 1)
        program = ctypes.create_string_buffer(code)
        with contextlib.suppress(OSError):  # a kernel without filters: all is as it is elsewhere
            made.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(program)))


def _overlap(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two addresses of sockets have a connection in common; 0.0.0.0 and :: are all of the machine."""
    hosts = [ipaddress.ip_address(address[0]) for address in (one, other)]
    hosts = [getattr(host, "ipv4_mapped", None) or host for host in hosts]
    same = hosts[0] == hosts[1] or any(host.is_unspecified for host in hosts)
    return bool(one[1]) and one[1] == other[1] and same


def address(listener: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    return f"http://{host_port(*listener.getsockname()[:2])}"


def host_port(host: str, port: int) -> str:
    """HOST:PORT, with brackets around the colons of IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
