"""What a job writes: all of it so far, or line by line to its end.

    for line in follow(submission): ...
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, Iterator

from distlm import cluster as clusters
from distlm.errors import ClusterError, InputError
from distlm.head import client, token
from distlm.jobs import ENDED_IN_RAY, Job, Submission, ray_job, read
from distlm.runs.folder import RunFolder

LOST_AFTER_S = 120
"""A follower gives up when the cluster has not answered for so long."""


def logs(submission: Submission) -> str:
    """All that the job has written so far. Raises ClusterError."""
    with client(submission.dashboard_url, submission.token_file) as http:
        answer = http.get(f"/api/jobs/{submission.id}/logs")
        if answer.status_code != 200:
            raise clusters.refusal(submission.dashboard_url, answer.status_code)
        return answer.json()["logs"] or ""


def follow(submission: Submission) -> Iterator[str]:
    """The lines of a job from its first to its last, each once, however often the connection breaks. Ends with the job.

    Raises ClusterError when the cluster has not answered for LOST_AFTER_S.
    """
    seen, rest, answered = 0, "", time.monotonic()
    ended = False
    while True:
        chunks = _final(submission) if ended else _tail(submission)
        position = 0                                       # the stream begins anew with each connection
        try:
            for chunk in chunks:
                answered = time.monotonic()
                fresh = chunk[max(0, seen - position):]
                position += len(chunk)
                seen = max(seen, position)
                *lines, rest = (rest + fresh).split("\n")
                yield from lines
            if ended:
                break
            info = ray_job(submission)
            if info is None:
                raise InputError("the cluster knows of no such job", where=submission.id, remedy="`distlm runs` lists jobs")
            answered = time.monotonic()
            ended = info["status"] in ENDED_IN_RAY
        except (ClusterError, OSError, asyncio.TimeoutError):
            if time.monotonic() - answered > LOST_AFTER_S:
                raise ClusterError(f"has not answered for {LOST_AFTER_S} s", where=submission.dashboard_url,
                                   remedy="the job may go on: `distlm status` tells once it answers") from None
        if not ended:
            time.sleep(0.5)
    if rest:
        yield rest


def _final(submission: Submission) -> Iterator[str]:
    yield logs(submission)


def _tail(submission: Submission) -> Iterator[str]:
    """Chunks of the job's output from its beginning, until it ends or the connection breaks (OSError).

    The loop runs in a thread of its own: a notebook has one already in this one."""
    chunks: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()

    async def receive() -> None:
        async for chunk in _stream(submission):
            chunks.put(chunk)

    task = loop.create_task(receive())

    def work() -> None:
        try:
            loop.run_until_complete(task)
            chunks.put(None)
        except BaseException as error:
            chunks.put(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=work, name="distlm-tail", daemon=True)
    thread.start()
    try:
        while (chunk := chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk
    finally:                                               # after Ctrl-C the stream is still open
        with contextlib.suppress(RuntimeError):            # the loop is closed
            loop.call_soon_threadsafe(task.cancel)
        thread.join(timeout=5)


async def _stream(submission: Submission) -> AsyncGenerator[str, None]:
    import aiohttp

    secret = token(submission.token_file)
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    url = f"{submission.dashboard_url}/api/jobs/{submission.id}/logs/tail"
    try:
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.ws_connect(url, heartbeat=20, max_msg_size=0) as socket_:
                async for message in socket_:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        yield message.data
    except aiohttp.ClientError as error:
        raise OSError(str(error)) from None


def driver_log(job: Job, follow: bool = False) -> Iterator[str]:
    """The lines of the log of a job that was not submitted; with `follow` to the job's end."""
    path, position, rest = job.folder / "logs" / "driver.log", 0, ""
    while True:
        ended = not read(RunFolder(job.folder)).active
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                data = file.read()
            position += len(data)
            *lines, rest = (rest + data.decode(errors="replace")).split("\n")
            yield from lines
        if ended or not follow:
            break
        time.sleep(0.3)
    if rest:
        yield rest
