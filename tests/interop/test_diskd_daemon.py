"""A real `diskd run`, real `diskctl`, stock clients: life, crash, fencing, checkpoints, bad input."""

import contextlib
import json
import random
import signal
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nbd_client as client
import pytest
import trio
from diskd_process import BINARIES, DiskdProcess, diskd
from programs import good, need, run

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MiB = 1 << 20


async def make_point(daemon: DiskdProcess, image: str) -> str:
    begun = await daemon.json("checkpoint", "begin", "--vm", "vm", "--image", image)
    assert begun["vm"] == "vm"
    assert begun["exports"] == {image: f"{image}:{begun['checkpoint']}"}
    await daemon.do("checkpoint", "end", begun["checkpoint"], "--keep-point")
    return str(begun["point"])


async def qemu_io(url: str, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    await good("qemu-io", "-f", "raw", *arguments, url)


def missed(changes: dict[str, Any], written: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of ``written`` that the extents do not cover."""
    extents = [(offset, offset + length) for offset, length in changes["extents"]]
    return [
        (offset, length)
        for offset, length in written
        if not any(start <= offset and offset + length <= stop for start, stop in extents)
    ]


async def test_a_life_with_stock_clients(tmp_path: Path) -> None:
    need("qemu-io")
    need("nbdinfo")
    async with diskd(tmp_path / "root") as daemon:
        created = await daemon.json("image", "create", "d", "64MiB")
        assert (created["name"], created["size"], created["block_size"]) == ("d", 64 * MiB, 4096)
        await qemu_io(f"{daemon.nbd}/d", "write -P 0xaa 1M 1M", "flush", "read -P 0 0 1M", "discard 1M 64k")
        (shown,) = await daemon.json("image", "list")
        assert (shown["state"], shown["epoch"], shown["holder"]) == ("open", 0, None)
        assert (await daemon.json("status"))["exports"] == ["d"]
        listed = json.loads((await good("nbdinfo", "--json", "--list", daemon.nbd)).out)
        assert [export["export-name"] for export in listed["exports"]] == ["d"]
        assert "d" in (await daemon.do("image", "list"))
        assert await daemon.end() == 0
        await daemon.start()
        await qemu_io(f"{daemon.nbd}/d", "read -P 0 1M 64k", "read -P 0xaa 1088k 960k")
        assert "disk.raw" in await daemon.do("image", "delete", "d", "--dry-run")
        assert await daemon.json("image", "list") != []
        await daemon.do("image", "delete", "d")
        assert await daemon.json("image", "list") == []
        assert await daemon.end(signal.SIGINT) == 0


async def test_import_and_copy_out(tmp_path: Path) -> None:
    need("nbdcopy")
    need("qemu-img")
    data = random.Random(5).randbytes(3 * MiB) + bytes(5 * MiB)
    (tmp_path / "in.raw").write_bytes(data)
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "import", "d", str(tmp_path / "in.raw"))
        await good("nbdcopy", f"{daemon.nbd}/d", str(tmp_path / "out.raw"))
        assert (tmp_path / "out.raw").read_bytes() == data
        await good(
            "qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "in.raw"), f"{daemon.nbd}/d"
        )


async def test_a_kill_under_load_forgets_no_change(tmp_path: Path) -> None:
    """T2 and T3: after kill -9 the changes are a superset of what was written, and exact."""
    need("qemu-io")
    generator = random.Random(9)
    written: list[tuple[int, int]] = []
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "256MiB")
        await qemu_io(f"{daemon.nbd}/d", "write -P 1 0 16M", "flush")
        point = await make_point(daemon, "d")
        assert (await daemon.json("changes", "d", "--since", point))["extents"] == []
        for _ in range(20):
            offset = generator.randrange(60_000) * 4096
            length = generator.choice((4096, 8192, 1 * MiB))
            written.append((offset, length))
        await qemu_io(f"{daemon.nbd}/d", *(f"write -P 7 {offset} {length}" for offset, length in written))
        assert await daemon.end(signal.SIGKILL) == -signal.SIGKILL
        await daemon.start()
        changes = await daemon.json("changes", "d", "--since", point)
        assert missed(changes, written) == []
        assert (changes["image"], changes["since"], changes["block_size"]) == ("d", point, 4096)
        assert changes["exact"]
        truth = {
            block for offset, length in written for block in range(offset // 4096, (offset + length) // 4096)
        }
        assert sum(length for _, length in changes["extents"]) == 4096 * len(truth)
        (listed,) = await daemon.json("point", "list", "d")
        assert (listed["point"], listed["valid"], listed["reason"]) == (point, True, None)
        assert "full backup" in await daemon.refuses("changes", "d", "--since", "rp-0123456789abcdef")
        await daemon.do("point", "delete", "d", point)
        assert await daemon.json("point", "list", "d") == []


async def write_until_it_breaks(
    address: str, export: str, sent: list[int], acknowledged: list[int], *, depth: int = 16
) -> None:
    """Random 4 KiB writes, ``depth`` of them in flight, until the server goes away."""
    host, _, port = address.rpartition(":")
    generator = random.Random(11)
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        data = b""

        async def receive(count: int) -> bytes:
            nonlocal data
            while len(data) < count:
                part = await stream.receive_some(65536)
                if not part:
                    raise trio.BrokenResourceError
                data += part
            taken, data = data[:count], data[count:]
            return taken

        await stream.send_all(client.FIXED_NO_ZEROES + client.go(export))
        await receive(client.GREETING_BYTES)
        while (header := struct.unpack(">QIII", await receive(20)))[2] != client.ACK:
            assert header[2] == client.REP_INFO
            await receive(header[3])
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                while len(sent) - len(acknowledged) < depth:
                    block = generator.randrange(16_000)
                    sent.append(block)
                    payload = struct.pack(">Q", len(sent)) * 512
                    await stream.send_all(
                        client.request(client.WRITE, block * 4096, cookie=len(sent) - 1, data=payload)
                    )
                _, error, cookie = struct.unpack(">IIQ", await receive(16))
                assert error == 0
                acknowledged.append(sent[cookie])


async def test_a_kill_in_the_middle_of_writes(tmp_path: Path) -> None:
    """T1 and T2 with requests in flight: every acknowledged block is reported, and nothing never sent."""
    sent: list[int] = []
    acknowledged: list[int] = []
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "64MiB")
        point = await make_point(daemon, "d")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_until_it_breaks, daemon.ready["nbd"], "d", sent, acknowledged)
            while len(acknowledged) < 2000:
                await trio.lowlevel.checkpoint()
            await daemon.end(signal.SIGKILL)
        await daemon.start()
        changes = await daemon.json("changes", "d", "--since", point)
        reported = {
            block
            for offset, length in changes["extents"]
            for block in range(offset // 4096, (offset + length) // 4096)
        }
        assert set(acknowledged) <= reported <= set(sent)
        assert changes["exact"]


class Shell:
    """An interactive qemu-io: one connection that stays."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process

    async def prompt(self) -> str:
        """What it prints until the next prompt, or until it ends."""
        assert self._process.stdout is not None
        answer = b""
        with trio.fail_after(20):
            while b"qemu-io> " not in answer:
                part = await self._process.stdout.receive_some(4096)
                if not part:
                    break
                answer += part
        return answer.decode()

    async def ask(self, command: str) -> str:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(command.encode() + b"\n")
        return await self.prompt()


@contextlib.asynccontextmanager
async def interactive(url: str) -> AsyncIterator[Shell]:
    process = await trio.lowlevel.open_process(
        [need("qemu-io"), "-f", "raw", url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        shell = Shell(process)
        await shell.prompt()
        yield shell
    finally:
        process.kill()
        with trio.move_on_after(20, shield=True):
            await process.wait()
        await process.stdin.aclose()
        await process.stdout.aclose()


async def test_a_stock_client_is_fenced(tmp_path: Path) -> None:
    """S1: once `lease acquire --epoch 2` has answered, qemu-io on d@1 can write nothing, now or later."""
    need("qemu-io")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "16MiB")
        taken = await daemon.json("lease", "acquire", "d", "--epoch", "1", "--holder", "n1/web")
        assert taken == {"image": "d", "epoch": 1, "holder": "n1/web"}
        assert (await run("qemu-io", "-f", "raw", "-c", "read 0 512", f"{daemon.nbd}/d")).code != 0
        async with interactive(f"{daemon.nbd}/d@1") as shell:
            assert "wrote 65536/65536" in await shell.ask("write -P 0x11 0 64k")
            await daemon.do("lease", "acquire", "d", "--epoch", "2", "--holder", "n2/web")
            answer = await shell.ask("write -P 0x22 0 64k")
            assert "write failed" in answer
        stale = await run("qemu-io", "-f", "raw", "-c", "write -P 0x33 0 64k", f"{daemon.nbd}/d@1")
        assert stale.code != 0
        await qemu_io(f"{daemon.nbd}/d@2", "read -P 0x11 0 64k", "write -P 0x44 64k 64k", "flush")
        assert "epoch" in await daemon.refuses("lease", "acquire", "d", "--epoch", "1", "--holder", "n1/web")
        assert await daemon.end(signal.SIGKILL) == -signal.SIGKILL
        await daemon.start()
        assert (await run("qemu-io", "-f", "raw", "-c", "read 0 512", f"{daemon.nbd}/d@1")).code != 0
        await qemu_io(f"{daemon.nbd}/d@2", "read -P 0x11 0 64k", "read -P 0x44 64k 64k")
        again = await daemon.json("lease", "acquire", "d", "--epoch", "2", "--holder", "n2/web")
        assert again == await daemon.json("lease", "show", "d")


async def test_one_connection_at_a_time_under_an_epoch(tmp_path: Path) -> None:
    need("qemu-io")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "16MiB")
        await daemon.do("lease", "acquire", "d", "--epoch", "5", "--holder", "n1/web")
        async with interactive(f"{daemon.nbd}/d@5") as first:
            assert "wrote" in await first.ask("write -P 1 0 64k")
            async with interactive(f"{daemon.nbd}/d@5") as second:
                assert "read 65536/65536" in await second.ask("read -P 1 0 64k")
                assert "wrote" not in await first.ask("write -P 2 0 64k")
                assert "wrote" in await second.ask("write -P 3 64k 64k")
                assert "read 65536/65536" in await second.ask("read -P 1 0 64k")
        await daemon.do("lease", "release", "d", "--epoch", "5", "--holder", "n1/web")
        assert (await run("qemu-io", "-f", "raw", "-c", "read 0 512", f"{daemon.nbd}/d@5")).code != 0
        shown = await daemon.json("lease", "show", "d")
        assert shown == {"image": "d", "epoch": 5, "holder": None}
        await qemu_io(f"{daemon.nbd}/d", "read -P 1 0 64k")


async def test_a_prepared_epoch_reads_and_is_promoted(tmp_path: Path) -> None:
    need("qemu-io")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "16MiB")
        await daemon.do("lease", "acquire", "d", "--epoch", "1", "--holder", "n1/web")
        async with interactive(f"{daemon.nbd}/d@1") as source:
            assert "wrote" in await source.ask("write -P 1 0 64k")
            await daemon.do("lease", "prepare", "d", "--epoch", "2", "--holder", "n2/web")
            async with interactive(f"{daemon.nbd}/d@2") as destination:
                assert "read 65536/65536" in await destination.ask("read -P 1 0 64k")
                assert "Operation not permitted" in await destination.ask("write -P 2 0 64k")
                assert "wrote" in await source.ask("write -P 1 64k 64k")
                await daemon.do("lease", "acquire", "d", "--epoch", "2", "--holder", "n2/web")
                assert "wrote" not in await source.ask("write -P 9 0 64k")
                assert "wrote" in await destination.ask("write -P 2 128k 64k")
                assert "read 131072/131072" in await destination.ask("read -P 1 0 128k")


async def test_stock_tools_refuse_the_raw_file_while_it_is_served(tmp_path: Path) -> None:
    need("qemu-img")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "16MiB")
        raw = str(tmp_path / "root" / "images" / "d" / "disk.raw")
        copy = str(tmp_path / "copy.raw")
        for argv in (
            ("qemu-img", "resize", "-f", "raw", raw, "32M"),
            ("qemu-img", "convert", "-f", "raw", "-O", "raw", raw, copy),
            ("qemu-io", "-f", "raw", "-c", "write 0 512", raw),
        ):
            refused = await run(*argv)
            assert refused.code != 0
            assert "lock" in refused.err
        assert await daemon.end() == 0
        await good("qemu-img", "convert", "-f", "raw", "-O", "raw", raw, copy)


async def test_a_frozen_view_for_pull_mode_backup(tmp_path: Path) -> None:
    need("qemu-io")
    need("nbdcopy")
    need("nbdinfo")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "16MiB")
        await qemu_io(f"{daemon.nbd}/d", "write -P 1 0 4M")
        point = await make_point(daemon, "d")
        await qemu_io(f"{daemon.nbd}/d", "write -P 2 1M 64k", "write -z 2M 64k")
        begun = await daemon.json("checkpoint", "begin", "--vm", "vm", "--image", "d")
        export = begun["exports"]["d"]
        await qemu_io(f"{daemon.nbd}/d", "write -P 3 0 8M", "flush", "read -P 3 1M 1M")
        (info,) = json.loads((await good("nbdinfo", "--json", f"{daemon.nbd}/{export}")).out)["exports"]
        assert info["is_read_only"]
        assert f"qemu:dirty-bitmap:{point}" in info["contexts"]
        dirty = f"--map=qemu:dirty-bitmap:{point}"
        runs = json.loads((await good("nbdinfo", "--json", dirty, f"{daemon.nbd}/{export}")).out)
        assert [(entry["offset"], entry["length"]) for entry in runs if entry["type"] == 1] == [
            (1 * MiB, 65536),
            (2 * MiB, 65536),
        ]
        await good("nbdcopy", f"{daemon.nbd}/{export}", str(tmp_path / "frozen.raw"))
        expected = bytearray(b"\1" * (4 * MiB) + bytes(12 * MiB))
        expected[1 * MiB : 1 * MiB + 65536] = b"\2" * 65536
        expected[2 * MiB : 2 * MiB + 65536] = bytes(65536)
        assert (tmp_path / "frozen.raw").read_bytes() == expected
        await daemon.refuses("checkpoint", "begin", "--vm", "vm", "--image", "d")
        await daemon.do("checkpoint", "end", begun["checkpoint"], "--discard")
        await qemu_io(f"{daemon.nbd}/d", "read -P 3 0 8M")
        assert (await run("nbdinfo", f"{daemon.nbd}/{export}")).code != 0
        changes = await daemon.json("changes", "d", "--since", point)
        assert missed(changes, [(0, 8 * MiB)]) == []


async def test_what_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    root = tmp_path / "root"

    async def fails(*arguments: str) -> str:
        argv = [str(BINARIES / "diskd"), "run", *arguments]
        with trio.fail_after(30):
            done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
        lines = [line for line in done.stderr.decode().splitlines() if line.startswith("diskd: ")]
        assert done.returncode == 1, done
        assert done.stdout == b""
        assert len(lines) == 1, done.stderr
        assert "Traceback" not in done.stderr.decode()
        return lines[0]

    async with diskd(root) as daemon:
        other = tmp_path / "other"
        other.mkdir()
        free = ("--control", "127.0.0.1:0", "--nbd", "127.0.0.1:0")
        assert "cannot listen on" in await fails("--root", str(other), "--nbd", daemon.ready["nbd"])
        assert "cannot listen on" in await fails(
            "--root", str(other), *free[2:], "--control", daemon.ready["control"]
        )
        assert "in use" in await fails("--root", str(root), *free)
        assert "no such directory" in await fails("--root", str(tmp_path / "absent"), *free)
        assert "did you mean 'max_open_bytes'" in await fails(
            "--root", str(other), "--set", "max_open_byte=1GiB"
        )
        assert "not TOML" in await fails("--root", str(other), "--config", __file__)
        assert "key" in await fails("--root", str(other), "--control", "0.0.0.0:0", "--nbd", "127.0.0.1:0")
        for arguments in (
            ("image", "create", "UPPER", "1GiB"),
            ("image", "create", "../../etc", "1GiB"),
            ("image", "create", "d", "0"),
            ("image", "show", "absent"),
            ("image", "delete", "absent"),
            ("image", "import", "d", "/nonexistent/file"),
            ("image", "resize", "d", "2GiB"),
            ("lease", "acquire", "absent", "--epoch", "1", "--holder", "x"),
            ("lease", "show", "absent"),
            ("point", "list", "absent"),
            ("changes", "absent", "--since", "rp-0123456789abcdef"),
            ("checkpoint", "begin", "--vm", "vm", "--image", "absent"),
            ("checkpoint", "end", "cp-0123456789abcdef"),
            ("image", "release", "absent"),
            ("image", "open", "absent"),
        ):
            await daemon.refuses(*arguments)
        assert (await daemon.ctl("image", "create", "d", "lots")).code == 2
        assert (await daemon.ctl("nonsense")).code == 2
        await daemon.do("image", "create", "d", "1MiB")
        await daemon.refuses("image", "create", "d", "1MiB")
        assert await daemon.end() == 0
    assert "connection refused" in await daemon.refuses("image", "list")


async def test_peers_that_talk_nonsense(tmp_path: Path) -> None:
    """Both ports survive garbage; a client that is connected notices nothing."""
    need("qemu-io")
    generator = random.Random(3)
    async with diskd(tmp_path / "root", "--set", "nbd_connections=8") as daemon:
        await daemon.do("image", "create", "d", "16MiB")
        opened = []
        for port in (daemon.ready["nbd"], daemon.ready["control"]):
            host, _, number = port.rpartition(":")
            for payload in (
                b"",
                b"\0" * 3,
                generator.randbytes(5000),
                struct.pack(">I", 0xFFFFFFFF) + b"x" * 99,
            ):
                stream = await trio.open_tcp_stream(host, int(number))
                opened.append(stream)
                await stream.send_all(payload)
        await daemon.do("image", "show", "d")
        await qemu_io(f"{daemon.nbd}/d", "write -P 9 0 1M", "read -P 9 0 1M")
        for stream in opened:
            await trio.aclose_forcefully(stream)
        assert await daemon.end() == 0
        assert "Traceback" not in daemon.log()


async def test_an_image_is_handed_over(tmp_path: Path) -> None:
    need("qemu-io")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "16MiB")
        point = await make_point(daemon, "d")
        await qemu_io(f"{daemon.nbd}/d", "write -P 5 1M 64k")
        await daemon.do("image", "release", "d")
        assert (await daemon.json("image", "show", "d"))["state"] == "released"
        assert (await run("qemu-io", "-f", "raw", "-c", "read 0 512", f"{daemon.nbd}/d")).code != 0
        await daemon.do("image", "open", "d")
        changes = await daemon.json("changes", "d", "--since", point)
        assert (changes["extents"], changes["exact"], changes["over_report_bytes"]) == (
            [[MiB, 65536]],
            True,
            0,
        )


async def test_stopping_sends_clients_home_and_keeps_their_data(tmp_path: Path) -> None:
    need("qemu-io")
    path = tmp_path / "nbd.sock"
    async with diskd(tmp_path / "root", "--nbd-socket", str(path)) as daemon:
        await daemon.do("image", "create", "d", "16MiB")
        url = f"nbd+unix:///d?socket={path}"
        async with interactive(url) as shell:
            assert "wrote" in await shell.ask("write -P 0x11 0 64k")
            (shown,) = await daemon.json("image", "list")
            assert shown["connections"] == 1
            assert await daemon.end() == 0
            assert "failed" in await shell.ask("write -P 0x22 0 64k")
        assert not path.exists()
        await daemon.start()
        await qemu_io(url, "read -P 0x11 0 64k")


async def test_off_the_loopback_control_wants_the_cluster_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    wrong = tmp_path / "wrong"
    wrong.write_text("fedcba9876543210fedcba9876543210")
    async with diskd(tmp_path / "root", "--control", "0.0.0.0:0", "--key", str(key)) as daemon:
        assert "key" in await daemon.refuses("image", "list")
        assert "key" in await daemon.refuses("--key", str(wrong), "image", "list")
        assert (await daemon.json("--key", str(key), "image", "list")) == []
        assert await daemon.end() == 0


async def test_settings_are_shown(tmp_path: Path) -> None:
    config = tmp_path / "diskd.toml"
    config.write_text('tracking_flush_interval = "2s"\n')
    argv = [
        str(BINARIES / "diskd"), "run", "--root", str(tmp_path), "--config", str(config),
        "--set", "max_open_bytes=1GiB", "--show-config",
    ]  # fmt: skip
    done = await trio.run_process(argv, capture_stdout=True)
    shown = json.loads(done.stdout)
    assert shown["tracking_flush_interval"] == 2.0
    assert shown["max_open_bytes"] == 1 << 30
