"""Collects votes through a browser: hands out the pages of a study one by one, and keeps every vote before it says so."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socketserver
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.preference import Ballot, Rater, Vote, load_study, vote_line
from diffusion2gan.evaluation.preference_make import OFFLINE
from diffusion2gan.files import disk_errors, lock

LARGEST_VOTE = 4096
PIECE = 1 << 16
# A sheet without a vote after this many seconds may go to somebody else, once no fresh one is left.
GIVEN_UP = 1800.0
PASSED_ON = "This sheet was not begun for half an hour and went to somebody else. Another one is at /"


def serve_study(folder: Path, host: str = "127.0.0.1", port: int = 8000, say: Callable[[str], None] = print) -> None:
    """Serves the study until it is interrupted; the same command goes on where it stopped. `port` 0: any that is free.

    Raises UserError for a folder that is no study or is being served, for simulated votes in it, and for an address that cannot
    be had.
    """
    with StudyServer(folder, host, port) as server:
        say(f"{server.url} gives out the sheets of {folder}, {server.box.total} votes of {server.box.asked} are there; Ctrl-C stops")
        server.serve_forever()


class VoteBox:
    """STUDY/votes.jsonl and STUDY/handed_out.jsonl: appended under a lock, on disk before a call returns; one process at a time."""

    def __init__(self, folder: Path):
        self.folder, self.study = folder, load_study(folder)
        if missing := [r.page for r in self.study.raters if not (folder / "pages" / r.page).exists()]:
            raise UserError(f"{folder / 'pages' / missing[0]}: no such file, expected the page of a rater; put it back as it was made")
        self.asked = sum(len(rater.trials) for rater in self.study.raters)
        self._raters = {rater.id: rater for rater in self.study.raters}
        self._ballot, self._lock = Ballot(self.study), threading.Lock()
        self._votes = _Lines(folder / "votes.jsonl")
        try:
            whole = self._ballot.add_lines(folder / "votes.jsonl", self._votes.content())
            if self._ballot.votes and self._ballot.votes[0].simulated:
                raise UserError(f"{folder / 'votes.jsonl'}: simulated votes, expected real ones or none; move the file elsewhere")
            self._votes.cut(whole)
            self._handed_out = _Lines(folder / "handed_out.jsonl")
        except BaseException:
            self._votes.close()
            raise
        self._given: dict[str, float] = {}
        self._turns: dict[str, int] = {}
        for line in self._handed_out.content().splitlines():
            try:
                row = json.loads(line)
                self._given[row["rater"]], self._turns[row["rater"]] = row["time"], row.get("turn", 1)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # half a line: that sheet was not handed out
        self._handed_out.cut(len(self._handed_out.content()))

    @property
    def total(self) -> int:
        return len(self._ballot.votes)

    def rater(self, name: str) -> Rater | None:
        return self._raters.get(name)

    def done(self, rater: Rater) -> list[str]:
        """Trials that the rater has voted on."""
        with self._lock:
            return sorted(self._ballot.seen(rater.id))

    def hand_out(self) -> Rater | None:
        """The next sheet nobody has; when there is none, the one handed out longest ago that was never begun. None: all in use."""
        with self._lock:
            now = time.time()
            unused = [r for r in self.study.raters if not self._ballot.seen(r.id)]
            fresh = [r for r in unused if r.id not in self._given]
            left = sorted((r for r in unused if self._given.get(r.id, now) < now - GIVEN_UP), key=lambda r: self._given[r.id])
            chosen = next(iter(fresh + left), None)
            if chosen:
                turn = self._turns.get(chosen.id, 0) + 1
                self._handed_out.append(json.dumps({"rater": chosen.id, "time": now, "turn": turn}).encode() + b"\n")
                self._given[chosen.id], self._turns[chosen.id] = now, turn
            return chosen

    def turn(self, rater: Rater) -> int:
        """How often the sheet was handed out; 1 for one that never was, which somebody was given by its address."""
        with self._lock:
            return self._turns.get(rater.id, 1)

    def add(self, vote: Vote, turn: int = 1) -> tuple[HTTPStatus, str]:
        """Keeps the vote of a page that was opened at `turn`. Returns OK when it is on disk, else why it was refused."""
        with self._lock:
            if reason := self._ballot.unknown(vote):
                return HTTPStatus.NOT_FOUND, reason
            if turn != self._turns.get(vote.rater, 1):
                return HTTPStatus.GONE, PASSED_ON
            if vote.trial in self._ballot.seen(vote.rater):
                return HTTPStatus.CONFLICT, "this trial has its vote"
            # On disk first: a vote that only memory knows would be refused when the page sends it again.
            self._votes.append(vote_line(vote))
            self._ballot.add(vote, "vote")
            return HTTPStatus.OK, "kept"

    def close(self) -> None:
        self._votes.close()
        self._handed_out.close()


class _Lines:
    """A file of lines that only grows, locked against other processes."""

    def __init__(self, path: Path):
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            lock(self._fd, f"{path}: another process serves this study, expected none; stop it first")
        except UserError:
            os.close(self._fd)
            raise

    def content(self) -> bytes:
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def cut(self, size: int) -> None:
        """Drops what follows the first `size` bytes, and ends the last line where its end was lost."""
        os.ftruncate(self._fd, size)
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self.append(b"\n")

    def append(self, line: bytes) -> None:
        size = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes written")
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, size)
            raise

    def close(self) -> None:
        os.close(self._fd)


class StudyServer(ThreadingHTTPServer):
    """The web server of one study; `serve_forever` runs it, `with` closes it."""

    daemon_threads = True
    # http.server's own 5 is what a handful of raters can exceed at once: the sixth connection would be reset, and a vote with it.
    request_queue_size = 128

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0):
        if not _is_loopback(host):
            warnings.warn(f"{host} can be reached from other machines, without password or encryption; 127.0.0.1 cannot", stacklevel=2)
        self.box = VoteBox(folder)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:  # server_close has been called
            raise UserError(f"{host} port {port}: cannot be used ({error}); choose another port, 0 for any that is free") from None
        self.url = f"http://{host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        # HTTPServer's own asks the name service for the host's name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a browser that was closed while it loaded a page
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def server_close(self) -> None:
        super().server_close()
        self.box.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _query(turn: int) -> str:
    return f"?turn={turn}" if turn > 1 else ""


def _turn(path: str) -> int:
    match = re.search(r"(?:^|&)turn=([0-9]{1,6})(?:&|$)", urlsplit(path).query)
    return int(match[1]) if match else 1


class _Handler(BaseHTTPRequestHandler):
    """GET / leads to a free sheet, GET /sheet/RATER is its page, POST /vote takes one vote. Nothing in a request becomes a path."""

    server: StudyServer
    server_version, sys_version = "diffusion2gan", ""
    timeout = 30  # seconds: a client that stops sending does not keep its thread for ever

    def do_GET(self) -> None:
        box = self.server.box
        # Who recruits people may add a query.
        if urlsplit(self.path).path == "/":
            try:
                free = box.hand_out()
            except OSError as error:
                return self._say(HTTPStatus.INSUFFICIENT_STORAGE, f"cannot be recorded ({error}); please tell those who run the study")
            if free is None:
                return self._say(HTTPStatus.SERVICE_UNAVAILABLE, "Every sheet of this study has been given out. Thank you for coming.")
            return self._answer(HTTPStatus.SEE_OTHER, b"", "text/plain", {"Location": f"/sheet/{free.id}{_query(box.turn(free))}"})
        match = re.fullmatch(r"/sheet/([0-9a-f]{16})", urlsplit(self.path).path)
        rater = box.rater(match[1]) if match else None
        if rater is None:
            return self._say(HTTPStatus.NOT_FOUND, "There is nothing here. The study begins at /")
        turn = _turn(self.path)
        if turn != box.turn(rater):
            return self._say(HTTPStatus.GONE, PASSED_ON)
        page = (box.folder / "pages" / rater.page).read_bytes()
        sink = json.dumps({"url": f"/vote{_query(turn)}", "done": box.done(rater)}).encode()
        return self._answer(HTTPStatus.OK, page.replace(OFFLINE, OFFLINE.replace(b"null", sink), 1), "text/html")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            return self._say(HTTPStatus.LENGTH_REQUIRED, "a vote needs its Content-Length")
        if int(length) > LARGEST_VOTE:
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes, expected at most {LARGEST_VOTE}")
            # Closing with unread bytes would cut off the answer.
            self.rfile.read(min(int(length), 1 << 20))
            return None
        body = self.rfile.read(int(length))
        if urlsplit(self.path).path != "/vote":
            return self._say(HTTPStatus.NOT_FOUND, "votes go to /vote")
        # A page of another site cannot send this type without asking first.
        if self.headers.get_content_type() != "application/json":
            return self._say(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a vote is application/json")
        try:
            vote = Vote.model_validate_json(body)
        except ValidationError as error:
            return self._say(HTTPStatus.BAD_REQUEST, f"no vote: {error.errors()[0]['msg']}")
        if vote.simulated or vote.received is not None:
            return self._say(HTTPStatus.BAD_REQUEST, "`simulated` and `received` are not the page's to say")
        received = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            return self._say(*self.server.box.add(vote.model_copy(update={"received": received}), _turn(self.path)))
        except OSError as error:
            return self._say(HTTPStatus.INSUFFICIENT_STORAGE, f"not kept: {error}")

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._answer(status, f"{text}\n".encode(), "text/plain")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        # Another rater at the same machine must get a sheet of their own.
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        # The time limit is for each piece: a page of many pictures may take minutes.
        view = memoryview(body)
        for start in range(0, len(view), PIECE):
            self.wfile.write(view[start : start + PIECE])

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: who voted from where is not kept."""
