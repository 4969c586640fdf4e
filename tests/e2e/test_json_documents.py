"""The JSON documents that others build on (DESIGN.md section 9): every key, in its place, null where absent.

Keys beyond these may be added, behind them; none may go, be renamed or be missing.
"""

import json
import subprocess

import pytest
from daemon_processes import BINARIES, FREE, SECONDS_MAX, daemon, node_toml

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PEER = """\
[peers.n2]
control = "127.0.0.1:1"
networks.a = "127.0.0.1:1"
"""


def out(*argv):
    done = subprocess.run(
        [BINARIES / argv[0], *map(str, argv[1:])],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def document(*argv):
    return json.loads(out(*argv, "--json"))


def has(keys, value):
    """``value`` has ``keys`` in this order, and after them perhaps others."""
    wanted = keys.split()
    assert list(value)[: len(wanted)] == wanted, value
    return value


def test_what_diskctl_prints(tmp_path):
    for name in ("root", "target"):
        (tmp_path / name).mkdir()
    with (
        daemon(
            tmp_path / "diskd.log",
            "diskd",
            "run",
            "--root",
            tmp_path / "root",
            "--nbd",
            FREE,
            "--control",
            FREE,
        ) as diskd,
        daemon(
            tmp_path / "target.log", "diskd", "target", "--root", tmp_path / "target", "--listen", FREE
        ) as target,
    ):
        ctl = ("diskctl", "--control", diskd["control"])
        out(*ctl, "image", "create", "d", "8MiB")
        for verb, epoch, holder in (("show", 0, None), ("acquire", 3, "n1/d"), ("release", 3, None)):
            options = [] if verb == "show" else ["--epoch", 3, "--holder", "n1/d"]
            lease = has("image epoch holder", document(*ctl, "lease", verb, "d", *options))
            assert lease == {"image": "d", "epoch": epoch, "holder": holder}
        begun = has(
            "checkpoint vm point exports", document(*ctl, "checkpoint", "begin", "--vm", "d", "--image", "d")
        )
        assert begun["exports"] == {"d": f"d:{begun['checkpoint']}"}
        out(*ctl, "checkpoint", "end", begun["checkpoint"], "--keep-point")
        (point,) = document(*ctl, "point", "list", "d")
        assert has("point rct_id valid reason", point)["reason"] is None
        assert point["point"] == begun["point"]
        assert "would delete" in out(*ctl, "point", "delete", "d", begun["point"], "--dry-run")
        changes = document(*ctl, "changes", "d", "--since", begun["point"])
        has("image since block_size exact over_report_bytes extents", changes)

        def backup(*options):
            lines = out(
                *ctl, "backup", "--vm", "d", "--image", "d", "--target", target["listen"], "--json", *options
            )
            result = json.loads(lines.splitlines()[-1])
            has("vm point base kind consistency seconds disks", result)
            (disk,) = result["disks"]
            has("image changed_bytes sent_bytes exact digest", disk)
            return result

        assert backup()["base"] is None
        assert backup()["kind"] == "differential"
        listed = document("diskctl", "target", "list", "--target", target["listen"])
        assert [point["kind"] for point in listed] == ["full", "differential"]
        for point in listed:
            assert {"vm", "point", "base", "kind", "committed_at", "disks"} <= set(point)
            has("name virtual_size file_size", point["disks"][0])


def test_what_clusterctl_prints(tmp_path):
    (tmp_path / "key").write_text("k" * 32)
    (tmp_path / "vm.toml").write_text(
        'name = "web"\nargv = ["sleep", "60"]\nmemory = "8GiB"\nstateless = true\n'
    )
    with daemon(
        tmp_path / "witness.log", "clusterd", "witness", "--data", tmp_path / "store", "--listen", FREE
    ) as store:
        (tmp_path / "node.toml").write_text(node_toml(store["url"]) + PEER)
        with daemon(tmp_path / "node.log", "clusterd", "run", "--config", tmp_path / "node.toml") as node:
            ctl = ("clusterctl", "--node", node["control"])
            assert "added" in out(*ctl, "vm", "add", "--no-start", tmp_path / "vm.toml")
            status = document(*ctl, "status")
            has("cluster answered_by as_of_s leader store properties nodes vms reachability held", status)
            row = has(
                "state liveness admission present since_s reason"
                " window_remaining_s quarantine_remaining_s ungraceful_exits",
                status["nodes"]["n1"],
            )
            assert row["window_remaining_s"] is None
            row = has(
                "state desired owner epoch pid since_s window_remaining_s last_io_age_s reason",
                status["vms"]["web"],
            )
            assert (row["state"], row["pid"], row["last_io_age_s"]) == ("offline", None, None)
            for held in document(*ctl, "hold", "list"):
                has("id kind subject why ends_when since_s", held)
            assert document(*ctl, "get")["heartbeat_interval"] == 1.0
            assert document(*ctl, "events")[0]["event"] == "node.started"
