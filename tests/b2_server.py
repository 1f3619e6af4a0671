"""A small Backblaze B2 on loopback, with a fault injected into any request and every one counted.

    with B2Server({"ai-readi/dataset/a.dcm": b"..."}) as server:
        # or B2Server(folder, prefix="ai-readi/dataset/")
        api = v3.B2Api(v3.InMemoryAccountInfo())
        api.authorize_account(server.key_id, server.key, realm=server.url)
        bucket = api.get_bucket_by_name(server.bucket)
        # the first download of every object is refused
        refused = {("download", 1): Fault(status=503)}
        server.fault = lambda kind, name, n: refused.get((kind, n))
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

HEADERS = -1  # an offset: before the status line is sent
CHUNK = 1 << 20  # bytes a write
ACCOUNT, BUCKET_ID, UPLOADED = "acc0unt", "b0cke7", 1700000000000
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


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer; several may be combined.

    Offsets count the bytes of this answer's body (of a range: from its start); HEADERS is before
    the status line; an offset at or behind the end does nothing, so none does to a HEAD.
    """

    status: int = 0  # this status and B2's JSON error in place of the answer
    # of that error: expired_auth_token, transaction_cap_exceeded, ...; "": CODES[status]
    code: str = ""
    retry_after: object = None  # Retry-After header: seconds or any text
    reset: int | None = None  # after so many bytes the connection is reset (ECONNRESET)
    # after so many bytes the connection is closed cleanly, short of Content-Length
    truncate: int | None = None
    flip: int | None = None  # this byte of the body is inverted; the headers stay right
    stall: float = 0  # seconds of silence ...
    stall_at: int = HEADERS  # ... after so many bytes
    rate: float = 0  # bytes of the body a second; 0: as fast as it goes


@dataclass(frozen=True)
class Object:
    """A version of an object in the bucket."""

    name: str
    id: str
    content: bytes | str | Path  # or where it is
    size: int
    header: str  # what the SHA-1 header and the listing say
    info: dict

    def open(self):
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        return open(self.content, "rb")

    def listed(self):
        """What a listing says of it."""
        return {
            "accountId": ACCOUNT,
            "action": "upload",
            "bucketId": BUCKET_ID,
            "contentLength": self.size,
            "contentMd5": None,
            "contentSha1": self.header,
            "contentType": "application/octet-stream",
            "fileId": self.id,
            "fileInfo": self.info,
            "fileName": self.name,
            "uploadTimestamp": UPLOADED,
            "serverSideEncryption": {"algorithm": None, "mode": None},
            "fileRetention": UNREADABLE,
            "legalHold": UNREADABLE,
        }

    def headers(self):
        """The headers of its download."""
        return {
            "Content-Type": "application/octet-stream",
            "X-Bz-File-Id": self.id,
            "X-Bz-File-Name": quote(self.name),
            "X-Bz-Content-Sha1": self.header,
            "X-Bz-Upload-Timestamp": UPLOADED,
            "Accept-Ranges": "bytes",
            **{f"X-Bz-Info-{key}": quote(value) for key, value in self.info.items()},
        }


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status, code="", retry_after=None):
        self.status, self.retry_after = status, retry_after
        self.code = code or CODES.get(status, "unknown")


class B2Server:
    """The store: its objects, keys and faults, and the requests it had."""

    def __init__(
        self, files=(), bucket="bucket", key_id="keyid", key="secret", restricted_to=None, prefix=""
    ):
        """files: {name: bytes, or path of a file} or a folder; files are read when asked for.
        prefix goes before every name."""
        self.bucket, self.key_id, self.key = bucket, key_id, key
        self.restricted_to = restricted_to
        self.fault = lambda kind, name, n: None
        self.requests, self.ranges, self.errors = [], defaultdict(list), []
        self.objects, self.ids, self.serial = {}, {}, itertools.count(1)
        self.tokens, self.expired = set(), set()
        self.counts, self.lock, self.closing = Counter(), threading.RLock(), threading.Event()
        if isinstance(files, (str, Path)):
            paths = [path for path in sorted(Path(files).rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path for path in paths}
        for name, content in dict(files).items():
            self.put(prefix + name, content)
        self.http = Http(("127.0.0.1", 0), Handler)
        self.http.site, self.http.connections = self, set()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self):
        servers.add(self)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, *_):
        if not self.thread.is_alive():
            return  # in a forked child
        self.closing.set()
        self.http.shutdown()
        self.thread.join()
        for connection in list(self.http.connections):
            with contextlib.suppress(OSError):  # the client was faster
                # wakes the thread that waits for the next request
                connection.shutdown(socket.SHUT_RDWR)
        self.http.server_close()  # waits for the threads of the connections
        if self.errors and not kind:
            raise self.errors[0]

    # ------------------------------------------------------------------------ for the tests

    def put(self, name, content, sha1="header"):
        """Add or replace an object; a version that was replaced can still be read by its id.
        content: bytes, or path of a file."""
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as f:
            digest = hashlib.file_digest(f, "sha1").hexdigest()
            size = f.seek(0, io.SEEK_END)
        headers = {"header": digest, "unverified": f"unverified:{digest}"}
        header = headers | {"info": "none", "none": "none"}
        info = {"large_file_sha1": digest} if sha1 == "info" else {}
        with self.lock:
            id_ = f"4_z{BUCKET_ID}_f{next(self.serial):08d}"
            new = Object(name, id_, content, size, header[sha1], info)
            self.objects[name] = self.ids[new.id] = new

    def remove(self, name):
        with self.lock:
            del self.ids[self.objects.pop(name).id]

    def count(self, kind=None, name=None):
        """How many requests there were, of that kind and for that name."""
        with self.lock:
            return sum(kind in (None, k) and name in (None, n) for k, n in self.requests)

    def expire_tokens(self):
        with self.lock:
            self.expired |= self.tokens
            self.tokens.clear()

    # ---------------------------------------------------------------------- for the handlers

    def note(self, kind, name, range_):
        """Count a request -> its Fault."""
        with self.lock:
            self.requests.append((kind, name))
            if kind == "download":
                self.ranges[name].append(range_)
            self.counts[kind, name] += 1
            return self.fault(kind, name, self.counts[kind, name]) or Fault()

    def authorize(self, header):
        if header != "Basic " + base64.b64encode(f"{self.key_id}:{self.key}".encode()).decode():
            raise Refused(401, "unauthorized")
        with self.lock:
            token = f"4_token_{next(self.serial):08d}"
            self.tokens.add(token)
        only = None
        if self.restricted_to:
            id_ = BUCKET_ID if self.restricted_to == self.bucket else "07he7"
            only = [{"id": id_, "name": self.restricted_to}]
        storage = {
            "infoType": "storageApi",
            "apiUrl": self.url,
            "downloadUrl": self.url,
            "s3ApiUrl": self.url,
            "absoluteMinimumPartSize": 5000000,
            "recommendedPartSize": 100000000,
            "allowed": {"buckets": only, "capabilities": CAPABILITIES, "namePrefix": None},
        }
        return {
            "accountId": ACCOUNT,
            "applicationKeyExpirationTimestamp": None,
            "authorizationToken": token,
            "apiInfo": {"storageApi": storage},
        }

    def check(self, token):
        if token not in self.tokens:
            raise Refused(401, "expired_auth_token" if token in self.expired else "bad_auth_token")
        if self.restricted_to not in (None, self.bucket):
            raise Refused(401, "unauthorized")

    def list_buckets(self, name):
        bucket = {
            "accountId": ACCOUNT,
            "bucketId": BUCKET_ID,
            "bucketName": self.bucket,
            "bucketType": "allPrivate",
            "bucketInfo": {},
            "corsRules": [],
            "lifecycleRules": [],
            "options": [],
            "revision": 1,
            "replicationConfiguration": None,
            "defaultServerSideEncryption": UNREADABLE,
            "fileLockConfiguration": UNREADABLE,
        }
        return {"buckets": [bucket] if name in ("", self.bucket, BUCKET_ID) else []}

    def list(self, params):
        prefix, start = params.get("prefix") or "", params.get("startFileName") or ""
        most = params.get("maxFileCount") or 100
        if params.get("bucketId") != BUCKET_ID:
            raise Refused(400, "bad_bucket_id")
        if not 1 <= most <= 10000:
            raise Refused(400, "out_of_range")
        with self.lock:
            names = sorted(name for name in self.objects if name.startswith(prefix))
            first = bisect.bisect_left(names, start)
            files = [self.objects[name] for name in names[first : first + most + 1]]
        after = files[most] if len(files) > most else None
        return {
            "files": [file.listed() for file in files[:most]],
            "nextFileName": after and after.name,
            "nextFileId": after and after.id,
        }


class Handler(BaseHTTPRequestHandler):
    """A connection, and the requests that come on it."""

    protocol_version = "HTTP/1.1"
    # headers and body are two writes: 40 ms each on a kept connection otherwise
    disable_nagle_algorithm = True

    def do_GET(self):
        site, url = self.server.site, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        params = json.loads(body or "{}") | dict(parse_qsl(url.query))
        if url.path.startswith("/file/"):
            bucket, _, name = unquote_plus(url.path.removeprefix("/file/")).partition("/")
            kind = "head" if self.command == "HEAD" else "download"
            object_ = site.objects.get(name) if bucket == site.bucket else None
        else:
            kind = KINDS.get(url.path.removeprefix("/b2api/v4/"), "unknown")
            object_ = site.ids.get(params.get("fileId"))
            by_kind = {
                "list_buckets": params.get("bucketName") or params.get("bucketId"),
                "list": params.get("prefix"),
                "unknown": url.path,
            }
            name = by_kind.get(kind, object_.name if object_ else params.get("fileId")) or ""
        fault = site.note(kind, name, self.headers.get("Range"))
        if fault.stall_at == HEADERS:
            self.pause(fault.stall)
        if fault.reset == HEADERS:
            return self.reset()
        try:
            if fault.status:
                raise Refused(fault.status, fault.code, fault.retry_after)
            self.answer(kind, name, object_, params, fault)
        except Refused as no:
            headers = {} if no.retry_after is None else {"Retry-After": no.retry_after}
            error = {"status": no.status, "code": no.code, "message": f"{no.code} ({kind})"}
            self.reply_json(no.status, error, fault, headers)

    do_HEAD = do_POST = do_GET

    def answer(self, kind, name, object_, params, fault):
        """The right answer, going wrong as fault says; or Refused."""
        site, token = self.server.site, self.headers.get("Authorization")
        if kind == "authorize":
            return self.reply_json(200, site.authorize(token), fault)
        site.check(token)
        if kind == "list_buckets":
            return self.reply_json(200, site.list_buckets(name), fault)
        if kind == "list":
            return self.reply_json(200, site.list(params), fault)
        if object_ is None or kind == "unknown":
            raise Refused(400 if kind == "unknown" else 404)
        if kind == "info":
            return self.reply_json(200, object_.listed(), fault)
        headers, size = object_.headers(), object_.size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.reply(200, headers, object_.open(), (0, size), fault)
        start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if start >= stop:
            raise Refused(416)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.reply(206, headers, object_.open(), (start, stop), fault)

    def reply_json(self, status, answer, fault, headers=None):
        body = json.dumps(answer).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.reply(status, headers, io.BytesIO(body), (0, len(body)), fault)

    def reply(self, status, headers, body, part, fault):
        """Status, headers and the bytes [start, stop) = part of the open file body, going wrong as
        fault says."""
        start, stop = part
        with body:
            if fault.truncate == HEADERS:
                raise ConnectionAbortedError  # closes it
            self.send_response(status)
            for key, value in {**headers, "Content-Length": stop - start}.items():
                self.send_header(key, str(value))
            self.end_headers()
            body.seek(start)
            if self.command != "HEAD":
                self.send_body(body, stop - start, fault)

    def send_body(self, body, length, fault):
        sent, began = 0, time.monotonic()
        largest = min(CHUNK, int(fault.rate / 20) or 1) if fault.rate else CHUNK
        breaks = [at for at in (fault.reset, fault.truncate, fault.stall_at) if at is not None]
        while sent < length:
            if sent == fault.stall_at:
                self.pause(fault.stall)
            if sent == fault.reset:
                return self.reset()
            if sent == fault.truncate:
                raise ConnectionAbortedError
            next_break = [at - sent for at in breaks if at > sent]
            data = body.read(min([largest, length - sent, *next_break]))
            if fault.flip is not None and sent <= fault.flip < sent + len(data):
                data = bytearray(data)
                data[fault.flip - sent] ^= 0xFF
            self.wfile.write(data)
            sent += len(data)
            if fault.rate:
                self.pause(max(0, began + sent / fault.rate - time.monotonic()))

    def pause(self, seconds):
        if self.server.site.closing.wait(seconds):
            raise ConnectionAbortedError  # rather than send the rest all at once

    def reset(self):
        # a reset discards what is still on its way: let the client have it, within a second
        for _ in range(100):
            if not any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))):
                break
            self.pause(0.01)
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with forking:
            # at once; socket.close() waits for the files made of it
            os.close(self.connection.detach())

    def log_message(self, *_):
        pass


class Http(ThreadingTCPServer):
    # with 5, the default, a burst of connections waits a second for a second SYN
    request_queue_size = 128

    def get_request(self):
        with forking:
            request, address = super().get_request()
            self.connections.add(request)
        return request, address

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self.connections.discard(request)

    def handle_error(self, request, address):
        # a client may leave when it likes
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.site.errors.append(sys.exc_info()[1])


servers = weakref.WeakSet()
forking = threading.Lock()  # no fork while a connection is open and forget() could not find it


def forget():
    """In a forked child: a connection that it holds would survive its reset."""
    forking.release()
    for server in servers:
        for connection in [server.http.socket, *server.http.connections]:
            if connection.fileno() >= 0:
                os.close(connection.detach())


os.register_at_fork(before=forking.acquire, after_in_parent=forking.release, after_in_child=forget)
