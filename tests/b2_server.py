"""A small Backblaze B2 on loopback, with a fault injected into any request and every one counted.

    with B2Server({"ai-readi/dataset/a.dcm": b"..."}) as server:
        # or B2Server(folder, prefix="ai-readi/dataset/")
        api = v3.B2Api(v3.InMemoryAccountInfo())
        api.authorize_account(server.key_id, server.key, realm=server.url)
        bucket = api.get_bucket_by_name(server.bucket)
        # the first download of every object is refused
        server.fault = lambda kind, name, n: Fault(status=503) if (kind, n) == ("download", 1) else None
        ...
        assert server.count("download", "ai-readi/dataset/a.dcm") == 2

It has enough of the native API (v4) for the real b2sdk to authorize, list and download.

Requests: `server.requests` is a list of (kind, name) in order of arrival. Kind and name are one of

    authorize ""                  list PREFIX        head OBJECT
    list_buckets BUCKET           download OBJECT    info OBJECT
    list_buckets "" (all)

A download by id is listed under its object's name; any other call is refused with 400 and listed as
unknown PATH. `server.ranges[name]` lists the Range header (or None) of its downloads.

Faults: server.fault(kind, name, n) is asked at every request, n = 1, 2, ... being the how many-th
of that kind for that name; it returns a Fault or None. It is called by one thread at a time, so it
may keep state. Examples, besides the one above:

    server.fault = lambda kind, name, n: Fault(rate=20e6)    # 20 MB/s a connection, everything
    queue = [Fault(reset=HEADERS), None, Fault(flip=100)]    # one for each request, then none
    server.fault = lambda *request: queue.pop(0) if queue else None

Objects: server.put(name, content, sha1="header"), server.remove(name). `sha1` says where B2 would
show the checksum: "header"; "info" (a large file: the header is "none" and fileInfo has
large_file_sha1); "unverified" (header, marked so); "none" (nowhere).

Keys: another key_id or key is refused with 401; restricted_to="other" restricts the key to that
bucket. expire_tokens() makes every token issued so far invalid, so that the SDK authorizes again.

Leaving the `with` closes every connection at once, waits for the server's threads and raises what
went wrong in them (a fault() that raised, ...). Another process may use the url; children may be
forked at any time, and have no part of the server.
"""

import base64
import bisect
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import socket
import struct
import sys
import termios
import threading
import time
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import parse_qsl, quote, unquote_plus, urlsplit

HEADERS = -1  # as an offset: before the status line
CHUNK = 65536
ACCOUNT, BUCKET_ID, UPLOADED = "a0123456789a", "b0123456789abcdef0123456", 1_700_000_000_000
CAPABILITIES = ["listBuckets", "listFiles", "readFiles"]
# a setting that this key may not see
UNREADABLE = {"isClientAuthorizedToRead": False, "value": None}
KINDS = {
    "b2_authorize_account": "authorize",
    "b2_list_buckets": "list_buckets",
    "b2_list_file_names": "list",
    "b2_list_file_versions": "list",
    "b2_get_file_info": "info",
    "b2_download_file_by_id": "download",
}
CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "access_denied",
    404: "not_found",
    408: "request_timeout",
    416: "range_not_satisfiable",
    429: "too_many_requests",
    500: "internal_error",
    503: "service_unavailable",
}
