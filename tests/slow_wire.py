"""A network between two namespaces that delays every packet and loses some, as tc's netem does on
kernels that have it.

    python tests/slow_wire.py NAMESPACE NAMESPACE DEVICE SECONDS LOSS

makes a device (TUN) in each namespace, says "ready", and carries packets between them until it is
killed; the devices go with it.
"""

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import sys
import time

CLONE_NEWNET = 0x40000000  # linux/sched.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


def device_in(namespace, name):
    """File descriptor of a new TUN device: a packet for each read and write."""
    with open(f"/run/netns/{namespace}") as f:
        if ctypes.CDLL(None, use_errno=True).setns(f.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def carry(ends, delay, loss):
    other, counter, on_the_way = dict(zip(ends, ends[::-1])), itertools.count(), []
    while True:
        wait = max(0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for fd in select.select(ends, [], [], wait)[0]:
            packet = os.read(fd, 1 << 16)
            if random.random() >= loss:
                arrives = time.monotonic() + delay
                heapq.heappush(on_the_way, (arrives, next(counter), other[fd], packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, fd, packet = heapq.heappop(on_the_way)
            with contextlib.suppress(OSError):  # the device is down: lost
                os.write(fd, packet)


if __name__ == "__main__":
    devices = [device_in(namespace, sys.argv[3]) for namespace in sys.argv[1:3]]
    print("ready", flush=True)
    carry(devices, float(sys.argv[4]), float(sys.argv[5]))
