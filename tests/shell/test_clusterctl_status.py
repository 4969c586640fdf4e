"""clusterctl status with several addresses: whose view is shown."""

import contextlib

import pytest
import trio

from clusterd.cli.ctl_client import Cluster
from clusterd.core.calls import STATUS, Document
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed, Registry, serve


def document(name, state, leader):
    return {"answered_by": name, "leader": leader, "store": "ok", "nodes": {name: {"state": state}}}


@contextlib.asynccontextmanager
async def answering(*documents):
    """The control addresses of nodes that answer with these documents."""
    async with trio.open_nursery() as nursery:
        addresses = []
        for one in documents:
            registry = Registry()

            async def answer(_params, _call, one=one):
                return Document(one)

            registry.add(STATUS, answer)

            async def start(*, task_status, registry=registry):
                await serve(registry, Address("127.0.0.1", 0), task_status=task_status)

            addresses.append(await nursery.start(start))
        yield tuple(addresses)
        nursery.cancel_scope.cancel()


async def test_the_view_of_an_isolated_node_is_not_shown_where_others_answer():
    views = (document("n1", "isolated", None), document("n3", "up", "n2"), document("n2", "up", "n2"))
    async with answering(*views) as addresses:
        assert (await Cluster(addresses, None).status())["answered_by"] == "n2"
        assert (await Cluster(addresses[:2], None).status())["answered_by"] == "n3"
        assert (await Cluster(addresses[:1], None).status())["answered_by"] == "n1"


async def test_nodes_that_do_not_answer_are_passed_over():
    async with answering(document("n2", "up", "n2")) as (alive,):
        async with answering(document("n1", "up", "n2")) as (gone,):
            pass
        assert (await Cluster((gone, alive), None).status())["answered_by"] == "n2"
        with pytest.raises(CallFailed, match=str(gone)):
            await Cluster((gone,), None).status()
