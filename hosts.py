"""Replicas that torchrun or srun has started, on one host or several: who they are, and a line
between them, so that all end soon after one has ended and only the first failure is printed.

    place = find()               # None where this process was started alone
    line = Line(place, store)    # store: torch.distributed's, by which rank 0 says its address
    line.leave(failure)          # at the end, with None, a text to print, or an exit status

gloo notices that a peer has ended in the next reduction, which may be hours away, nccl perhaps
never, and torchrun looks after the processes of its own host alone. On the line, the system tells
at once when a process ends, and by TCP's keepalive within 11 s when its host or network is gone.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass

MEETING = 600  # seconds in which all replicas must have come
GRACE = 5  # seconds in which a replica ends by itself after another has left with an exit status
# the bytes of the line: a replica asks rank 0 whether its failure is the first, and is answered;
# it says that it is done, or that it leaves with an exit status. NO also comes unasked
ASK, YES, NO, DONE, FAILED = b"?", b"y", b"n", b".", b"!"
TOKEN = 32  # letters


@dataclass
class Place:
    """Of this replica: its number and how many there are, of all hosts and of this one; and where
    all of them meet."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int


def find():
    """The Place that torchrun or scripts/slurm.sh gave to this process, None where it has none.
    ValueError where the variables contradict each other."""
    if "RANK" not in os.environ:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set in the environment, but RANK is not;"
                " start with torchrun or scripts/slurm.sh, or unset WORLD_SIZE"
            )
        return None
    numbers = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"
    missing = [name for name in (*numbers, "MASTER_ADDR") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"RANK is set in the environment, but {', '.join(missing)} is not; start with torchrun "
            "or scripts/slurm.sh, which set all of them, or unset RANK to run in one process"
        )
    said = " ".join(f"{name}={os.environ[name]}" for name in numbers)
    try:
        rank, world, local_rank, port = (int(os.environ[name]) for name in numbers)
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except ValueError:
        raise ValueError(
            f"not all of these are whole numbers: {said}, and LOCAL_WORLD_SIZE"
        ) from None
    if not 0 <= local_rank <= rank < world:
        raise ValueError(f"{said} does not fit: LOCAL_RANK <= RANK < WORLD_SIZE must hold")
    if not 0 < port < 65536 or local_world < 1:
        raise ValueError(
            f"{said} does not fit: MASTER_PORT is from 1 to 65535, LOCAL_WORLD_SIZE at least 1"
        )
    return Place(rank, world, local_rank, local_world, os.environ["MASTER_ADDR"], port)


def own_address(place):
    """-> family, text: this host's address on the way to where the replicas meet. ValueError where
    no way leads there."""
    kind = socket.SOCK_DGRAM
    try:
        family, _, _, _, target = socket.getaddrinfo(place.address, place.port, type=kind)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            return family, probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR={place.address}: {socket.gethostname()} does not reach that "
            f"({error.strerror}); name the host of rank 0 as all others know it"
        ) from error


def interface(place):
    """Name of the network interface that has own_address; None where the system does not tell.

    gloo would take the one that has the host's name, on Debian the loopback.
    """
    import fcntl

    family, address = own_address(place)
    if family != socket.AF_INET or sys.platform != "linux":
        return None
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def keep_alive(connection):
    """Within 11 s, the system closes a connection whose other end does not answer."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # macOS
    for name, value in {idle: 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def received(connection, count):
    """So many bytes, or fewer where the other end has closed."""
    content = b""
    while len(content) < count:
        piece = connection.recv(count - len(content))
        if not piece:
            break
        content += piece
    return content


class Line:
    """TCP connections between rank 0 and every other replica, and a thread that listens.

    ConnectionError where not all come within MEETING.
    """

    def __init__(self, place, store):
        self.place, self.lock = place, threading.Lock()
        self.has_left = False  # what others do no longer matters
        self.is_told = False  # a replica has failed, and has said so or is about to
        self.is_first, self.answered = False, threading.Event()
        meet = self.accept if place.rank == 0 else self.connect
        self.ends = meet(store)  # {rank: connection}
        self.hosts = {rank: end.getpeername()[0] for rank, end in self.ends.items()}
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def accept(self, store):
        """Of rank 0: the connections of all others."""
        family, address = own_address(self.place)
        token, ends, deadline = secrets.token_hex(TOKEN // 2), {}, time.monotonic() + MEETING
        with socket.create_server(("", 0), family=family, backlog=self.place.world) as server:
            store.set("line", json.dumps([address, server.getsockname()[1], token]))
            while len(ends) < self.place.world - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise ConnectionError(
                        f"{len(ends) + 1} of {self.place.world} replicas came within {MEETING} s; "
                        "look at what the others print on their hosts"
                    ) from None
                connection.settimeout(10)
                with contextlib.suppress(OSError, ValueError):  # a stranger is not let in
                    hello = received(connection, TOKEN + 8).decode()
                    if secrets.compare_digest(hello[:TOKEN], token):
                        keep_alive(connection)
                        ends[int(hello[TOKEN:])] = connection
        return ends

    def connect(self, store):
        """Of any other rank: the connection to rank 0."""
        address, port, token = json.loads(store.get("line"))
        # on Debian a host's own name leads to its loopback
        is_loopback = address.startswith("127.") or address == "::1"
        address = self.place.address if is_loopback else address
        connection = socket.create_connection((address, port), MEETING)
        connection.sendall(f"{token}{self.place.rank:8d}".encode())
        keep_alive(connection)
        return {0: connection}

    def say(self, word, *ranks):
        """Send a word to replicas at the other ends."""
        for rank in ranks:
            with contextlib.suppress(OSError):  # gone: `listen` sees that too
                self.ends[rank].sendall(word)

    def listen(self):
        """The thread: until all others have left."""
        with selectors.DefaultSelector() as selector:
            for rank, end in self.ends.items():
                selector.register(end, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        word = key.fileobj.recv(1)
                    except OSError:
                        word = b""
                    if word in (b"", DONE, FAILED):
                        selector.unregister(key.fileobj)
                    self.hear(word, key.data)

    def hear(self, word, rank):
        """A word of a replica; b"" when its connection is gone."""
        if word == ASK:
            self.say(YES if self.claim(rank) else NO, rank)
        elif word in (YES, NO):
            self.is_told, self.is_first = True, self.is_first or word == YES
            self.answered.set()
        elif word == FAILED:
            self.claim()
            timer = threading.Timer(GRACE, self.end)
            timer.daemon = True
            timer.start()
        elif word == b"" and not self.has_left:
            if self.claim():
                who = f"replica {rank} of {self.place.world}, on {self.hosts[rank]},"
                what = "was killed, out of memory perhaps, or its host or network is gone"
                remedy = "train.resume=auto goes on from the last save"
                print(f"error: {who} {what}; {remedy}", file=sys.stderr, flush=True)
            self.end()

    def claim(self, asking=None):
        """Is no failure known yet? From now on one is. Rank 0 tells the others, but not the one
        that asks, which would take that for its answer."""
        with self.lock:
            is_first, self.is_told = not self.is_told, True
        if self.place.rank == 0:
            if is_first:
                self.say(NO, *(rank for rank in self.ends if rank != asking))
            return is_first
        # rank 0 is lost and can tell nobody: one replica of each host says so
        speaker = 1 if self.place.rank == self.place.local_rank else 0
        return is_first and self.place.local_rank == speaker

    def end(self):
        """End this process, unless it is about to end by itself."""
        if not self.has_left:
            sys.stdout.flush()
            os._exit(1)

    def may_speak(self):
        """Is a failure of this replica the first of all?"""
        if self.place.rank == 0:
            return self.claim()
        self.say(ASK, 0)
        is_answered = self.answered.wait(2 * GRACE)
        return self.is_first or not is_answered

    def leave(self, failure):
        """Print a text of the first failure; the others end too then. failure: None where there is
        none, or an exit status, with which the others are about to end too, perhaps."""
        self.has_left = bool(failure)  # first, so that `listen` does not end this process meanwhile
        if isinstance(failure, str):
            if self.may_speak():
                print(failure, file=sys.stderr, flush=True)
            return  # and the connections close with this process
        if failure and self.place.rank == 0:
            self.claim()
        if self.place.rank:
            self.has_left = True
            self.say(FAILED if failure else DONE, 0)
        else:  # the others' store may live in this process
            self.thread.join(GRACE if failure else None)
