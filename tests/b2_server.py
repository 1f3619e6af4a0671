"""A small Backblaze B2 on loopback: enough of the native API (v4) for the real b2sdk to authorize, list and download, with a
fault injected into any request and every request counted.

    with B2Server({"ai-readi/dataset/a.dcm": b"..."}) as server:      # or B2Server(folder, prefix="ai-readi/dataset/")
        api = v3.B2Api(v3.InMemoryAccountInfo())
        api.authorize_account(server.key_id, server.key, realm=server.url)
        bucket = api.get_bucket_by_name(server.bucket)
        server.fault = lambda kind, name, n: Fault(status=503) if kind == "download" and n == 1 else None
        ...                                                           # the first download of every object is refused
        assert server.count("download", "ai-readi/dataset/a.dcm") == 2

Requests: `server.requests` is a list of (kind, name) in order of arrival. Kind and name are one of
    authorize ""    list_buckets BUCKET ("": all)    list PREFIX    download OBJECT    head OBJECT    info OBJECT
A download by id is listed under its object's name; any other call is refused with 400 and listed as unknown PATH.
`server.ranges[name]` lists the Range header (or None) of its downloads.

Faults: server.fault(kind, name, n) is asked at every request, n = 1, 2, ... being the how many-th of that kind for that name;
it returns a Fault or None. It is called by one thread at a time, so it may keep state. Examples, besides the one above:
    server.fault = lambda kind, name, n: Fault(rate=20e6)             # 20 MB/s a connection, everything
    queue = [Fault(reset=HEADERS), None, Fault(flip=100)]             # one for each request, then none
    server.fault = lambda *request: queue.pop(0) if queue else None
    server.fault = lambda kind, name, n: Fault(truncate=9) if zlib.crc32(f"{kind}{name}{n}".encode()) % 10 == 0 else None

Objects: server.put(name, content, sha1="header"), server.remove(name). `sha1` says where B2 would show the checksum: "header";
"info" (a large file: the header is "none" and fileInfo has large_file_sha1); "unverified" (header, marked so); "none" (nowhere).
Keys: another key_id or key is refused with 401; restricted_to="other" restricts the key to that bucket. expire_tokens() makes
every token issued so far invalid, so that the SDK authorizes again.

Leaving the `with` closes every connection at once, waits for the server's threads and raises what went wrong in them (a fault()
that raised, ...). Another process may use the url; children may be forked at any time, and have no part of the server.
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
UNREADABLE = {"isClientAuthorizedToRead": False, "value": None}  # a setting that this key may not see
CAPABILITIES = ["listBuckets", "listFiles", "readFiles"]
KINDS = {"b2_authorize_account": "authorize", "b2_list_buckets": "list_buckets", "b2_list_file_names": "list",
         "b2_list_file_versions": "list", "b2_get_file_info": "info", "b2_download_file_by_id": "download"}
CODES = {400: "bad_request", 401: "unauthorized", 403: "access_denied", 404: "not_found", 408: "request_timeout",
         416: "range_not_satisfiable", 429: "too_many_requests", 500: "internal_error", 503: "service_unavailable"}


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer; several may be combined. Offsets count the bytes of this answer's body (of a range: from
    its start); HEADERS is before the status line; an offset at or behind the end does nothing, so none does to a HEAD."""
    status: int = 0                # this status and B2's JSON error in place of the answer
    code: str = ""                 # of that error: expired_auth_token, transaction_cap_exceeded, ...; "": CODES[status]
    retry_after: object = None     # Retry-After header: seconds or any text
    reset: int | None = None       # after so many bytes the connection is reset (ECONNRESET)
    truncate: int | None = None    # after so many bytes the connection is closed cleanly, short of Content-Length
    flip: int | None = None        # this byte of the body is inverted; the headers stay right
    stall: float = 0               # seconds of silence ...
    stall_at: int = HEADERS        # ... after so many bytes
    rate: float = 0                # bytes of the body a second; 0: as fast as it goes


@dataclass(frozen=True)
class Object:
    name: str
    id: str
    content: bytes | str | Path  # or where it is
    size: int
    header: str  # what the SHA-1 header and the listing say
    info: dict

    def open(self):
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else open(self.content, "rb")

    def listed(self):
        return {"accountId": ACCOUNT, "action": "upload", "bucketId": BUCKET_ID, "contentLength": self.size, "contentMd5": None,
                "contentSha1": self.header, "contentType": "application/octet-stream", "fileId": self.id, "fileInfo": self.info,
                "fileName": self.name, "uploadTimestamp": UPLOADED, "serverSideEncryption": {"algorithm": None, "mode": None},
                "fileRetention": UNREADABLE, "legalHold": UNREADABLE}

    def headers(self):
        return {"Content-Type": "application/octet-stream", "X-Bz-File-Id": self.id, "X-Bz-File-Name": quote(self.name),
                "X-Bz-Content-Sha1": self.header, "X-Bz-Upload-Timestamp": UPLOADED, "Accept-Ranges": "bytes",
                **{f"X-Bz-Info-{key}": quote(value) for key, value in self.info.items()}}


class Refused(Exception):
    def __init__(self, status, code="", retry_after=None):
        self.status, self.code, self.retry_after = status, code or CODES.get(status, "unknown"), retry_after


class B2Server:
    def __init__(self, files=(), bucket="bucket", key_id="keyid", key="secret", restricted_to=None, prefix=""):
        """files: {name: bytes, or path of a file} or a folder; files are read when asked for. prefix goes before every name."""
        self.bucket, self.key_id, self.key, self.restricted_to = bucket, key_id, key, restricted_to
        self.fault = lambda kind, name, n: None
        self.requests, self.ranges, self.errors = [], defaultdict(list), []
        self.objects, self.ids, self.tokens, self.expired, self.serial = {}, {}, set(), set(), itertools.count(1)
        self.counts, self.lock, self.closing = Counter(), threading.RLock(), threading.Event()
        if isinstance(files, (str, Path)):
            files = {path.relative_to(files).as_posix(): path for path in sorted(Path(files).rglob("*")) if path.is_file()}
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
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for the next request
        self.http.server_close()  # waits for the threads of the connections
        if self.errors and not kind:
            raise self.errors[0]

    def put(self, name, content, sha1="header"):
        """Add or replace an object; a version that was replaced can still be read by its id. content: bytes, or path of a file."""
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as f:
            digest = hashlib.file_digest(f, "sha1").hexdigest()
            size = f.seek(0, io.SEEK_END)
        header = {"header": digest, "unverified": f"unverified:{digest}", "info": "none", "none": "none"}[sha1]
        with self.lock:
            new = Object(name, f"4_z{BUCKET_ID}_f{next(self.serial):08d}", content, size, header,
                         {"large_file_sha1": digest} if sha1 == "info" else {})
            self.objects[name] = self.ids[new.id] = new

    def remove(self, name):
        with self.lock:
            del self.ids[self.objects.pop(name).id]

    def count(self, kind=None, name=None):
        with self.lock:
            return sum(kind in (None, k) and name in (None, n) for k, n in self.requests)

    def expire_tokens(self):
        with self.lock:
            self.expired |= self.tokens
            self.tokens.clear()

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
        only = [{"id": BUCKET_ID if self.restricted_to == self.bucket else "07he7", "name": self.restricted_to}]
        return {"accountId": ACCOUNT, "applicationKeyExpirationTimestamp": None, "authorizationToken": token, "apiInfo": {"storageApi": {
            "infoType": "storageApi", "apiUrl": self.url, "downloadUrl": self.url, "s3ApiUrl": self.url,
            "absoluteMinimumPartSize": 5000000, "recommendedPartSize": 100000000,
            "allowed": {"buckets": only if self.restricted_to else None, "capabilities": CAPABILITIES, "namePrefix": None}}}}

    def check(self, token):
        if token not in self.tokens:
            raise Refused(401, "expired_auth_token" if token in self.expired else "bad_auth_token")
        if self.restricted_to not in (None, self.bucket):
            raise Refused(401, "unauthorized")

    def list_buckets(self, name):
        bucket = {"accountId": ACCOUNT, "bucketId": BUCKET_ID, "bucketName": self.bucket, "bucketType": "allPrivate", "bucketInfo": {},
                  "corsRules": [], "lifecycleRules": [], "options": [], "revision": 1, "replicationConfiguration": None,
                  "defaultServerSideEncryption": UNREADABLE, "fileLockConfiguration": UNREADABLE}
        return {"buckets": [bucket] if name in ("", self.bucket, BUCKET_ID) else []}

    def list(self, params):
        prefix, start, most = params.get("prefix") or "", params.get("startFileName") or "", params.get("maxFileCount") or 100
        if params.get("bucketId") != BUCKET_ID or not 1 <= most <= 10000:
            raise Refused(400, "bad_bucket_id" if params.get("bucketId") != BUCKET_ID else "out_of_range")
        with self.lock:
            names = sorted(name for name in self.objects if name.startswith(prefix))
            first = bisect.bisect_left(names, start)
            files = [self.objects[name] for name in names[first:first + most + 1]]
        after = files[most] if len(files) > most else None
        return {"files": [file.listed() for file in files[:most]], "nextFileName": after and after.name, "nextFileId": after and after.id}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each on a kept connection otherwise

    def do_GET(self):
        site, url = self.server.site, urlsplit(self.path)
        params = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}") | dict(parse_qsl(url.query))
        if url.path.startswith("/file/"):
            bucket, _, name = unquote_plus(url.path.removeprefix("/file/")).partition("/")
            kind, object_ = "head" if self.command == "HEAD" else "download", site.objects.get(name) if bucket == site.bucket else None
        else:
            kind, object_ = KINDS.get(url.path.removeprefix("/b2api/v4/"), "unknown"), site.ids.get(params.get("fileId"))
            name = {"list_buckets": params.get("bucketName") or params.get("bucketId"), "list": params.get("prefix"),
                    "unknown": url.path}.get(kind, object_.name if object_ else params.get("fileId")) or ""
        fault = site.note(kind, name, self.headers.get("Range"))
        if fault.stall_at == HEADERS:
            self.pause(fault.stall)
        if fault.reset == HEADERS:
            return self.reset()
        try:
            if fault.status:
                raise Refused(fault.status, fault.code, fault.retry_after)
            if kind == "authorize":
                return self.reply_json(200, site.authorize(self.headers.get("Authorization")), fault)
            site.check(self.headers.get("Authorization"))
            if kind == "list_buckets":
                return self.reply_json(200, site.list_buckets(name), fault)
            if kind == "list":
                return self.reply_json(200, site.list(params), fault)
            if object_ is None or kind == "unknown":
                raise Refused(400 if kind == "unknown" else 404)
            if kind == "info":
                return self.reply_json(200, object_.listed(), fault)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not asked:
                return self.reply(200, object_.headers(), object_.open(), 0, object_.size, fault)
            start, stop = int(asked[1]), min(int(asked[2] or object_.size) + 1, object_.size)
            if start >= stop:
                raise Refused(416)
            headers = object_.headers() | {"Content-Range": f"bytes {start}-{stop - 1}/{object_.size}"}
            self.reply(206, headers, object_.open(), start, stop, fault)
        except Refused as no:
            headers = {} if no.retry_after is None else {"Retry-After": no.retry_after}
            self.reply_json(no.status, {"status": no.status, "code": no.code, "message": f"{no.code} ({kind})"}, fault, headers)

    do_HEAD = do_POST = do_GET

    def reply_json(self, status, answer, fault, headers={}):
        body = json.dumps(answer).encode()
        self.reply(status, {"Content-Type": "application/json", **headers}, io.BytesIO(body), 0, len(body), fault)

    def reply(self, status, headers, body, start, stop, fault):
        """Status, headers and bytes [start, stop) of the open file body, going wrong as fault says."""
        with body:
            if fault.truncate == HEADERS:
                raise ConnectionAbortedError  # closes it
            self.send_response(status)
            for key, value in {**headers, "Content-Length": stop - start}.items():
                self.send_header(key, str(value))
            self.end_headers()
            body.seek(start)
            sent, length, began = 0, stop - start if self.command != "HEAD" else 0, time.monotonic()
            largest = min(CHUNK, int(fault.rate / 20) or 1) if fault.rate else CHUNK
            breaks = [at for at in (fault.reset, fault.truncate, fault.stall_at) if at is not None]
            while sent < length:
                if sent == fault.stall_at:
                    self.pause(fault.stall)
                if sent == fault.reset:
                    return self.reset()
                if sent == fault.truncate:
                    raise ConnectionAbortedError
                data = body.read(min([largest, length - sent, *(at - sent for at in breaks if at > sent)]))
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
        for _ in range(100):  # a reset discards what is still on its way: let the client have it, within a second
            if not any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))):
                break
            self.pause(0.01)
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with forking:
            os.close(self.connection.detach())  # at once; socket.close() waits for the files made of it

    def log_message(self, *_):
        pass


class Http(ThreadingTCPServer):
    request_queue_size = 128  # with 5, the default, a burst of connections waits a second for a second SYN

    def get_request(self):
        with forking:
            request, address = super().get_request()
            self.connections.add(request)
        return request, address

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self.connections.discard(request)

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may leave when it likes
            self.site.errors.append(sys.exc_info()[1])


servers, forking = weakref.WeakSet(), threading.Lock()  # no fork while a connection is open and forget() could not find it


def forget():
    """In a forked child: a connection that it holds would survive its reset."""
    forking.release()
    for server in servers:
        for connection in [server.http.socket, *server.http.connections]:
            if connection.fileno() >= 0:
                os.close(connection.detach())


os.register_at_fork(before=forking.acquire, after_in_parent=forking.release, after_in_child=forget)
