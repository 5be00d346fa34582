"""A server of buckets on loopback: as much of the S3 protocol, and of Google's JSON protocol, as reading takes. Faults on demand.

moto, which has all of S3, needs an older python-dateutil than constraints.txt holds, and cannot break a connection.

    with Buckets({"data": {"texts/a.txt": b"..."}}) as buckets:
        find_files([Source(path=f"s3://data/texts?{buckets.query}")])
"""

import email.utils
import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape

START = 1_700_000_000


@dataclass(frozen=True)
class Request:
    """What a client asks for. `bucket` is all of a listing's path."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    range: tuple[int, int | None] | None

    @property
    def is_listing(self) -> bool:
        return not self.key


Fault = Callable[[Request], Any]
"""What goes wrong. An HTTP status to answer with; "cut": half of the body, and then the end; a threading.Event: nothing before it is set;
None: no fault."""


@dataclass
class Buckets:
    """`objects` may be changed at any time. `requests` are those that came in."""

    objects: dict[str, dict[str, bytes]]
    """Bytes by bucket and key."""
    page: int = 1000
    """Keys of one answer to a listing."""
    fault: Fault = lambda request: None
    requests: list[Request] = field(default_factory=list)
    modified: dict[str, int] = field(default_factory=dict)
    """Seconds after START, by key."""
    keys: tuple[str, ...] = ()
    """Access keys that may read; default: everyone may."""

    def __enter__(self) -> "Buckets":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"buckets": self}))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    @property
    def query(self) -> str:
        return f"endpoint_override={self.address}&scheme=http&region=us-east-1&anonymous=true"

    def reads(self, key: str) -> list[Request]:
        """The requests for an object's bytes."""
        return [request for request in self.requests if request.method == "GET" and request.key == key]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    buckets: Buckets

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        google = re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
        bucket, key = (google.group(1), google.group(2) or "") if google else (url.path[1:].partition("/")[::2])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        range = (int(asked.group(1)), int(asked.group(2)) if asked.group(2) else None) if asked else None
        request = Request(self.command, urllib.parse.unquote(bucket), urllib.parse.unquote(key), query, range)
        self.buckets.requests.append(request)
        fault = self.buckets.fault(request)
        if isinstance(fault, threading.Event):
            fault.wait(60)
            self.close_connection = True
        elif isinstance(fault, int):
            self.refuse(fault, "InternalError" if fault >= 500 else "AccessDenied")
        else:
            self.serve(request, bool(google), "/o" in url.path, fault == "cut")

    def serve(self, request: Request, google: bool, listing: bool, cut: bool) -> None:
        signed = re.search("Credential=([^/]+)/", self.headers.get("Authorization", ""))
        if self.buckets.keys and not (signed and signed.group(1) in self.buckets.keys):
            return self.refuse(403, "InvalidAccessKeyId" if signed else "AccessDenied")
        objects = self.buckets.objects.get(request.bucket)
        if objects is None:
            return self.refuse(404, "NoSuchBucket")
        if not request.key:
            if google:
                return self.send(json.dumps(self.google_list(request, objects) if listing else {"name": request.bucket}).encode(),
                                 "application/json")
            return self.send(self.s3_list(request, objects).encode(), "application/xml")
        data = objects.get(request.key)
        if data is None:
            return self.refuse(404, "NoSuchKey")
        if google and request.query.get("alt") != "media":
            return self.send(json.dumps(self.google_object(request, request.key, data)).encode(), "application/json")
        status, headers = 200, {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Last-Modified": email.utils.formatdate(
            START + self.buckets.modified.get(request.key, 0), usegmt=True)}
        if request.range and request.method == "GET":
            first, last = request.range[0], min(len(data) - 1, len(data) if request.range[1] is None else request.range[1])
            if first >= len(data):
                return self.refuse(416, "InvalidRange")
            status, headers["Content-Range"], data = 206, f"bytes {first}-{last}/{len(data)}", data[first:last + 1]
        self.send(data, "application/octet-stream", status, headers, cut)

    def send(self, body: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def refuse(self, status: int, code: str) -> None:
        self.send(f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(), "application/xml", status)

    def listed(self, request: Request, objects: dict[str, bytes], token: str) -> tuple[list[str], list[str], str]:
        """Keys, common prefixes, and where the next page begins."""
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        items: dict[str, bool] = {}
        for key in sorted(objects):
            if key.startswith(prefix):
                end = key.find(delimiter, len(prefix)) if delimiter else -1
                items[key if end < 0 else key[:end + 1]] = end >= 0
        limit = min(self.buckets.page, int(request.query.get("max-keys") or request.query.get("maxResults") or 1000))
        left = [item for item in items if item > token] if token else list(items)
        page = left[:limit]
        return ([item for item in page if not items[item]], [item for item in page if items[item]], page[-1] if left[limit:] else "")

    def s3_list(self, request: Request, objects: dict[str, bytes]) -> str:
        keys, prefixes, after = self.listed(request, objects, request.query.get("continuation-token", ""))
        contents = "".join(f"<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size><LastModified>{self.at(key)}</LastModified>"
                           "</Contents>" for key in keys)
        contents += "".join(f"<CommonPrefixes><Prefix>{escape(prefix)}</Prefix></CommonPrefixes>" for prefix in prefixes)
        more = f"<NextContinuationToken>{escape(after)}</NextContinuationToken>" if after else ""
        return (f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
                f"<Name>{request.bucket}</Name><KeyCount>{len(keys) + len(prefixes)}</KeyCount>"
                f"<IsTruncated>{str(bool(after)).lower()}</IsTruncated>{more}{contents}</ListBucketResult>")

    def google_object(self, request: Request, key: str, data: bytes) -> dict[str, Any]:
        return {"kind": "storage#object", "name": key, "bucket": request.bucket, "size": str(len(data)), "updated": self.at(key),
                "timeCreated": self.at(key), "generation": "1", "metageneration": "1", "etag": hashlib.md5(data).hexdigest()}

    def google_list(self, request: Request, objects: dict[str, bytes]) -> dict[str, Any]:
        keys, prefixes, after = self.listed(request, objects, request.query.get("pageToken", ""))
        return {"kind": "storage#objects", "items": [self.google_object(request, key, objects[key]) for key in keys], "prefixes": prefixes,
                **({"nextPageToken": after} if after else {})}

    def at(self, key: str) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(START + self.buckets.modified.get(key, 0)))
