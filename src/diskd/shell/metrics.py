"""The metrics endpoint: `GET /metrics` over plain HTTP/1.1, one request per connection, nothing else.

A whole HTTP server would be larger than all that is needed here. It is read-only, knows no keys and shows
names of images and numbers: whoever reaches the address sees them.
"""

from collections.abc import Callable
from typing import Final

import structlog
import trio

from daemonkit.ports import Address, listening_failed
from diskd.core.metrics import CONTENT_TYPE

REQUEST_BYTES_MAX: Final = 8192
REQUEST_SECONDS_MAX: Final = 5.0
CONNECTIONS_MAX: Final = 16

log = structlog.get_logger("metrics")


async def serve_metrics(
    address: Address,
    produce: Callable[[], str],
    *,
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Until cancelled; started() gives the bound address. Raises OperatorError where it cannot listen."""
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise listening_failed(address, error) from error
    slots = trio.Semaphore(CONNECTIONS_MAX)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                slots.acquire_nowait()
            except trio.WouldBlock:
                return
            try:
                with trio.move_on_after(REQUEST_SECONDS_MAX):
                    await _answer(stream, produce)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                log.debug("metrics.connection_broke", reason=str(error))
            finally:
                slots.release()

    task_status.started(Address(address.host, listeners[0].socket.getsockname()[1]))
    await trio.serve_listeners(answer, listeners)


async def _answer(stream: trio.SocketStream, produce: Callable[[], str]) -> None:
    request = b""
    while b"\r\n\r\n" not in request and b"\n\n" not in request:
        data = await stream.receive_some(REQUEST_BYTES_MAX)
        request += data
        if not data or len(request) > REQUEST_BYTES_MAX:
            return
    method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        await _send(stream, "405 Method Not Allowed", "only GET is served here\n", "text/plain", method)
    elif path != b"/metrics":
        await _send(stream, "404 Not Found", "the numbers are at /metrics\n", "text/plain", method)
    else:
        await _send(stream, "200 OK", produce(), CONTENT_TYPE, method)


async def _send(stream: trio.SocketStream, status: str, text: str, content: str, method: bytes) -> None:
    body = text.encode()
    head = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {content}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        "\r\n",
    ]
    await stream.send_all("\r\n".join(head).encode() + (b"" if method == b"HEAD" else body))
