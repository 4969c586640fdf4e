"""Real clusterd processes: two of three hosts vanish at once, and an operator lets them go."""

import json
from pathlib import Path

import pytest
import trio
from clusterd_trio import running_trio, vm_is

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_what_the_brake_holds_goes_on_by_an_operators_word(tmp_path: Path) -> None:
    async with running_trio(tmp_path) as cluster:
        await cluster.set(resiliency_period="1s")
        for name, more in (("web", "stateless = true"), ("lone", "")):
            file = cluster.vm_file(name, extra=f'{more}\npreferred_nodes = ["n3"]')
            await cluster.ok("vm", "add", str(file))
            await cluster.until(vm_is(name, "online", owner="n3"), f"{name} online on n3")
        async with trio.open_nursery() as nursery:
            for name in ("n2", "n3"):
                nursery.start_soon(cluster.members[name].power_off)
        await cluster.until(vm_is("web", "held"), "web held", of="n1")
        await cluster.until(vm_is("lone", "held"), "lone held", of="n1")

        held = {item["id"]: item for item in json.loads(await cluster.ok("hold", "list", "--json"))}
        assert {"brake", "brake-n2", "brake-n3", "failover-web", "failover-lone"} == set(held)
        assert {item["kind"] for item in held.values()} == {"brake", "failover"}
        assert all(item["why"] and item["ends_when"] and item["since_s"] >= 0 for item in held.values())
        for wrong, says in (("brake-n1", "nothing is held under"), ("failover-lone", "confirm-dead n3")):
            refused = await cluster.ctl("hold", "release", wrong)
            (line,) = refused.stderr.decode().splitlines()
            assert (refused.returncode, says in line) == (1, True), line

        assert "n2, n3" in await cluster.ok("hold", "release", "brake")
        await cluster.until(vm_is("web", "online", owner="n1"), "web failed over", of="n1")
        document = await cluster.until(lambda d: len(d["held"]) == 1, "the brake is off", of="n1")
        assert document["held"][0]["id"] == "failover-lone"
        events = await cluster.ok("events", "--json")
        named = {event["event"] for event in json.loads(events)}
        assert {"brake.engaged", "brake.released"} <= named
