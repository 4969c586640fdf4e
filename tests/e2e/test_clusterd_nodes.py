"""Real clusterd processes with a witness on loopback: the shell and the core together."""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import trio
from clusterd_trio import BIN, DEADLINE_S, FAST, all_up, running_trio, vm_is, write_members

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_a_vm_outlives_its_clusterd_and_a_stateless_one_its_host(tmp_path: Path) -> None:
    async with running_trio(tmp_path) as cluster:
        await cluster.ok("set", "resiliency_period", "1m")
        text = await cluster.ok("get")
        assert all(name in text for name in FAST)
        assert (await cluster.ok("get", "heartbeat_interval")).strip() == "100ms"

        # Added, placed where it prefers to be, running there.
        await cluster.ok(
            "vm", "add", str(cluster.vm_file("web", extra='stateless = true\npreferred_nodes = ["n1"]'))
        )
        document = await cluster.until(vm_is("web", "online", owner="n1"), "web online on n1")
        run = document["vms"]["web"]
        assert run["pid"] in cluster.members["n1"].vm_pids()
        for member in cluster.members.values():
            await cluster.until(
                vm_is("web", "online", pid=run["pid"]), f"{member.name} knows", of=member.name
            )
        assert "web" in await cluster.ok("status")
        assert "web" in await cluster.ok("vm", "list")
        assert 'argv = ["sleep", "100000"]' in await cluster.ok("vm", "show", "web")
        assert "vm.started" in await cluster.ok("--node", cluster.members["n1"].control, "events")

        # Killed, and started again: the same process, the same epoch.
        n1 = cluster.members["n1"]
        await n1.kill()
        await n1.start()
        same = {key: run[key] for key in ("owner", "epoch", "pid")}
        await cluster.until(lambda d: all_up(d) and vm_is("web", "online", **same)(d), "adopted after a kill")

        # Told to end, it says goodbye, ends with code 0, and its VM goes on.
        assert await n1.kill(signal.SIGTERM) == 0
        os.kill(run["pid"], 0)
        await n1.start()
        await cluster.until(
            lambda d: all_up(d) and vm_is("web", "online", **same)(d), "adopted after SIGTERM"
        )
        assert (await cluster.status())["nodes"]["n1"]["ungraceful_exits"] in (0, 1)

        # The host dies, VM and all: after the window the VM runs elsewhere, under a higher epoch.
        await cluster.set(resiliency_period="1s")
        await n1.power_off()
        document = await cluster.until(
            lambda d: vm_is("web", "online")(d) and d["vms"]["web"]["owner"] != "n1", "failed over"
        )
        assert document["vms"]["web"]["epoch"] > run["epoch"]
        assert document["nodes"]["n1"]["state"] in ("isolated", "down")
        await n1.start()
        await cluster.until(all_up, "n1 back under a new boot id")

        # Stopped and removed.
        refused = await cluster.ctl("vm", "remove", "web", "--dry-run")
        assert refused.returncode == 1
        assert b"stop it first" in refused.stderr
        await cluster.ok("vm", "stop", "web")
        await cluster.until(vm_is("web", "offline"), "stopped")
        await cluster.ok("vm", "remove", "web")
        await cluster.until(lambda d: "web" not in d["vms"], "removed")


async def test_without_the_store_every_vm_goes_on_and_status_answers(tmp_path: Path) -> None:
    async with running_trio(tmp_path, count=2) as cluster:
        await cluster.ok("vm", "add", str(cluster.vm_file("web", extra="stateless = true")))
        before = (await cluster.until(vm_is("web", "online"), "web online"))["vms"]["web"]
        cluster.store.kill()
        await cluster.store.wait()
        document = await cluster.until(lambda d: d["store"] == "unknown", "store unknown")
        assert document["vms"]["web"]["pid"] == before["pid"]
        os.kill(before["pid"], 0)
        refused = await cluster.ctl("vm", "stop", "web")
        assert refused.returncode == 1
        assert len(refused.stderr.decode().splitlines()) == 1
        os.kill(before["pid"], 0)


async def run_clusterd(*words: str) -> tuple[int, str]:
    with trio.fail_after(DEADLINE_S):
        done = await trio.run_process(
            [str(Path(sys.executable).parent / words[0]), *words[1:]],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return done.returncode, done.stderr.decode()


async def test_what_is_wrong_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    member = write_members(tmp_path, 1, "http://127.0.0.1:1")["n1"]
    wrong = tmp_path / "n1" / "wrong.toml"
    wrong.write_text(member.config.read_text().replace("vcpus", "vcpsu"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = tmp_path / "n1" / "busy.toml"
        busy.write_text(member.config.read_text().replace(member.control, f"127.0.0.1:{port}"))
        witness = ("clusterd", "witness", "--data", str(tmp_path / "w"), "--listen")
        cases = [
            (("clusterd", "run", "--config", str(wrong)), 1, "unknown key 'vcpsu', did you mean 'vcpus'?"),
            (("clusterd", "run", "--config", str(busy)), 1, "cannot listen on"),
            (("clusterd", "run", "--config", str(tmp_path / "none")), 1, "No such file"),
            (("clusterd", "run"), 2, "Missing option '--config'"),
            (("clusterd", "run", "--nonsense"), 2, "No such option"),
            ((*witness, f"127.0.0.1:{port}"), 1, "cannot listen on"),
            ((*witness, "nonsense"), 2, "is not an address"),
            (("clusterd", "whatif", "--outages", "x.csv"), 1, "whatif is not built"),
            (("clusterctl", "status"), 2, "give --node HOST:PORT"),
            (("clusterctl", "--node", "127.0.0.1:1", "status"), 1, "cannot connect to 127.0.0.1:1"),
            (("clusterctl", "--node", "127.0.0.1", "status"), 2, "is not an address"),
            (("clusterctl", "--node", "127.0.0.1:1", "vm", "show", "No/Name"), 1, "a name is"),
            (("clusterctl", "store", "recover", "--without", "No/Name"), 1, "a name is"),
            (("clusterctl", "node", "add", "x.toml"), 1, "node add is not built"),
        ]  # fmt: skip
        for words, code, says in cases:
            found, text = await run_clusterd(*words)
            lines = [line for line in text.splitlines() if not line.startswith("{")]
            assert (found, len(lines)) == (code, 1), (words, text)
            assert says in lines[0]


async def test_a_second_clusterd_on_the_same_data_is_refused_and_the_first_lives(tmp_path: Path) -> None:
    async with running_trio(tmp_path, count=1) as cluster:
        code, text = await run_clusterd("clusterd", "run", "--config", str(cluster.members["n1"].config))
        assert code == 1
        assert "in use by another process" in text
        async with await trio.open_tcp_stream("127.0.0.1", int(cluster.members["n1"].control[10:])) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n" * 100)
        for nonsense in (b"", b"\xff" * 1400, b"\x81" * 2000):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                text = cluster.members["n1"].config.read_text()
                port = int(text.split("[[networks]]")[1].split("127.0.0.1:")[1].split('"')[0])
                sender.sendto(nonsense, ("127.0.0.1", port))
        await cluster.until(all_up, "still up")

        # Somebody follows the events; when the daemon vanishes, so does he, with exit code 1.
        argv = [
            str(BIN / "clusterctl"),
            "--node",
            cluster.members["n1"].control,
            "events",
            "--follow",
            "--json",
        ]
        follower = await trio.lowlevel.open_process(argv, stdout=PIPE, stderr=PIPE)
        assert follower.stdout is not None
        assert follower.stderr is not None
        async with follower.stdout, follower.stderr:
            with trio.fail_after(DEADLINE_S):
                line = b""
                while b"\n" not in line:
                    line += await follower.stdout.receive_some()
                first = json.loads(line.splitlines()[0])
                assert (first["event"], first["node"], first["seq"]) == ("node.started", "n1", 1)
                await cluster.members["n1"].kill()
                assert await follower.wait() == 1
                assert len((await follower.stderr.receive_some()).splitlines()) == 1
