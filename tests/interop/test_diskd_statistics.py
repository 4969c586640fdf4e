"""What `diskctl show`, `diskctl status` and the metrics endpoint say, beside what was really done."""

import contextlib
import json
import signal
import subprocess

import pytest
import trio
from diskd_process import SECONDS_MAX, DiskdProcess, diskd
from programs import good, need

from daemonkit.units import KiB, MiB

pytestmark = [pytest.mark.interop, pytest.mark.slow]


async def http(daemon: DiskdProcess, request: bytes) -> bytes:
    host, port = daemon.ready["metrics"].split(":")
    with trio.fail_after(SECONDS_MAX):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(request)
            answer = b""
            with contextlib.suppress(trio.BrokenResourceError):
                async for part in stream:
                    answer += part
    return answer


async def numbers(daemon: DiskdProcess) -> dict[str, float]:
    head, _, body = (await http(daemon, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"), head
    assert f"Content-Length: {len(body)}".encode() in head
    lines = [line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def test_what_a_guest_does_is_counted_where_it_is_shown(tmp_path):
    async with diskd(tmp_path / "root", "--metrics", "127.0.0.1:0") as daemon:
        await daemon.do("image", "create", "a", "64MiB")
        before = (await daemon.json("show", "a"))["io"]
        assert set(before.values()) == {0}
        script = [
            ["write 0 4k", "write 4k 4k", "write 2M 1M", "write 16M 2M"],
            ["read 0 4k", "read 0 512k", "read 16M 2M"],
            ["write -z 8M 1M", "write -z -u 9M 64k", "discard 10M 128k", "flush"],
        ]
        commands = [word for part in script for command in part for word in ("-c", command)]
        await good("qemu-io", "-f", "raw", *commands, f"{daemon.nbd}/a")
        shown = await daemon.json("show", "a")
        io = shown["io"]
        assert io["written_bytes"] == 8 * KiB + 3 * MiB and io["writes"] >= 4
        assert io["read_bytes"] >= 4 * KiB + 512 * KiB + 2 * MiB and io["reads"] >= 3
        assert (io["zeroes"], io["zeroed_bytes"]) == (2, MiB + 64 * KiB)
        assert (io["trims"], io["trimmed_bytes"]) == (1, 128 * KiB)
        assert io["flushes"] >= 1 and io["flush_seconds"] > 0 and io["errors"] == 0
        # Regions 0, 2, 8, 9, 10, 16 and 17 at least; what was opened ahead comes on top.
        assert io["regions_opened"] >= 7 and io["marks"] >= 1
        assert shown["max_open_bytes"] == 4 << 30 and shown["clients"] == []
        found = await numbers(daemon)
        for name in ("reads", "writes", "zeroes", "trims", "flushes", "regions_opened", "marks"):
            assert found[f'holdfast_image_{name}_total{{image="a"}}'] == io[name], name
        assert found['holdfast_image_written_bytes_total{image="a"}'] == io["written_bytes"]


async def test_clients_lease_points_and_failures_are_shown(tmp_path):
    async with diskd(tmp_path / "root", "--metrics", "127.0.0.1:0") as daemon:
        for name in ("a", "b"):
            await daemon.do("image", "create", name, "8MiB")
        await daemon.do("image", "release", "b")
        begun = await daemon.json("checkpoint", "begin", "--vm", "a", "--image", "a")
        await daemon.do("checkpoint", "end", begun["checkpoint"], "--keep-point")
        await daemon.do("lease", "acquire", "a", "--epoch", "7", "--holder", "n1/a")
        stays = ["-c", "write 0 4k", "-c", "read 0 4k", "-c", f"sleep {SECONDS_MAX * 1000}"]
        process = await trio.lowlevel.open_process(
            [need("qemu-io"), "-f", "raw", *stays, f"{daemon.nbd}/a@7"], stdout=subprocess.DEVNULL
        )
        with trio.fail_after(SECONDS_MAX):
            while True:  # until both have been served
                shown = await daemon.json("image", "show", "a")
                if shown["io"]["reads"] and shown["io"]["writes"]:
                    break
        (client,) = shown["clients"]
        assert client["export"] == "a@7" and client["peer"].startswith("127.0.0.1:")
        assert client["requests"] >= 2 and client["age"] >= 0
        assert (shown["lease"]["epoch"], shown["lease"]["holder"]) == (7, "n1/a")
        assert [point["valid"] for point in shown["reference_points"]] == [True]
        text = await daemon.do("show")
        assert "a@7" in text and "released" in text and begun["point"] in text
        everything = await daemon.json("show")
        assert [document["name"] for document in everything] == ["a", "b"]
        assert everything[1]["io"] is None and everything[1]["state"] == "released"
        found = await numbers(daemon)
        assert found['holdfast_image_state{image="b",state="released"}'] == 1
        assert found['holdfast_image_clients{image="a"}'] == 1
        assert found['holdfast_image_epoch{image="a"}'] == 7
        assert "there is no" in await daemon.refuses("show", "c")
        process.send_signal(signal.SIGKILL)
        await process.wait()


async def test_the_daemon_tells_how_it_is(tmp_path):
    async with diskd(tmp_path / "root", "--metrics", "127.0.0.1:0") as daemon:
        status = await daemon.json("status")
        assert status["uptime"] > 0 and status["loop_lag"] >= 0 and status["threads"] >= 1
        assert status["memory"] > MiB and 0 < status["open_files"] < status["open_files_max"]
        assert (status["images"], status["closed"]) == (0, 0)
        assert "up " in await daemon.do("status")
        found = await numbers(daemon)
        assert found["holdfast_diskd_uptime_seconds"] >= status["uptime"]


async def test_the_endpoint_answers_nothing_else_and_bears_anything(tmp_path):
    async with diskd(tmp_path / "root", "--metrics", "127.0.0.1:0") as daemon:
        assert b" 404 " in await http(daemon, b"GET / HTTP/1.0\r\n\r\n")
        assert b" 405 " in await http(daemon, b"POST /metrics HTTP/1.0\r\n\r\n")
        head = await http(daemon, b"HEAD /metrics HTTP/1.0\r\n\r\n")
        assert b" 200 " in head and head.endswith(b"\r\n\r\n")
        assert await http(daemon, b"\xff" * 9000) == b""
        assert (await numbers(daemon))["holdfast_diskd_connections"] == 0
        log = [json.loads(line) for line in daemon.log().splitlines()]
        assert not [line for line in log if line["level"] == "error"]
