"""How ``clusterctl`` reaches a node: each given address in turn, until one of them answers."""

import math
import os
import re
from typing import Any, Final, TypeVar

import attrs
import click
import trio

from clusterd.core.calls import STATUS, Nothing
from clusterd.core.status_choice import choose_status
from daemonkit.cli import CALL_SECONDS_MAX, read_key, run_async
from daemonkit.errors import OperatorError, UsageError
from daemonkit.methods import Method
from daemonkit.ports import Address
from daemonkit.progress import Progress
from daemonkit.rpc import CallFailed, connect

P = TypeVar("P")
R = TypeVar("R")

CONNECT_SECONDS_MAX: Final = 2.0
ADDRESSES_MAX: Final = 64


@attrs.frozen
class Cluster:
    """The addresses to try, and the key to show them."""

    addresses: tuple[Address, ...]
    key: bytes | None

    def read(self, method: Method[P, R], params: P) -> R:
        """Ask whichever node answers."""
        return run_async(lambda: self.ask(method, params, repeatable=True))

    def command(self, method: Method[P, R], params: P) -> R:
        """Ask one node only, once it took the connection: asking twice could do it twice."""
        return run_async(lambda: self.ask(method, params, repeatable=False))

    def work(self, method: Method[P, R], params: P, progress: Progress) -> R:
        """A long call of one node: whichever takes the connection. It ends with this process."""
        try:
            return run_async(lambda: self.ask(method, params, repeatable=False, progress=progress))
        finally:
            progress.finish()

    async def status(self) -> dict[str, Any]:
        """The status document to believe, of those that the given nodes answer with. Raises as ``ask``.

        A node whose cables are pulled sees everybody else as isolated: where others answer too, its view
        is not the one to show.
        """
        documents: dict[str, dict[str, Any]] = {}
        failures: list[str] = []

        async def ask_one(address: Address) -> None:
            try:
                answer = await Cluster((address,), self.key).ask(STATUS, Nothing(), repeatable=True)
            except CallFailed as error:
                failures.append(str(error))
            else:
                documents[answer.document["answered_by"]] = answer.document

        async with trio.open_nursery() as nursery:
            for address in self.addresses[:ADDRESSES_MAX]:
                nursery.start_soon(ask_one, address)
        chosen = choose_status(documents)
        if chosen is None:
            raise CallFailed("; ".join(sorted(failures)))
        return chosen

    async def ask(
        self, method: Method[P, R], params: P, *, repeatable: bool, progress: Progress | None = None
    ) -> R:
        """The answer; with ``progress``, however long it takes. Raises CallRefused, or CallFailed with what
        each address said."""
        seconds_max = CALL_SECONDS_MAX if progress is None else math.inf
        failures: list[str] = []
        for address in self.addresses:
            connected = False
            try:
                with trio.fail_after(CONNECT_SECONDS_MAX) as connecting:
                    async with connect(address, key=self.key) as client:
                        connected, connecting.deadline = True, math.inf
                        with trio.fail_after(seconds_max):
                            return await client.call(method, params, on_progress=progress)
            except trio.TooSlowError:
                failure = f"{address}: no answer"
            except CallFailed as error:
                failure = str(error)
            if connected and progress is not None:
                raise CallFailed(f"{failure}; it was given up: run it again")
            if connected and not repeatable:
                raise CallFailed(f"{failure}; whether it was done is unknown: look at `clusterctl status`")
            failures.append(failure)
        raise CallFailed("; ".join(failures))


def find_cluster(nodes: tuple[str, ...], key_file: str | None) -> Cluster:
    """From the options, else from HOLDFAST_NODE. Raises UsageError where no address is given."""
    texts = list(nodes) or [text for text in re.split(r"[\s,]+", os.environ.get("HOLDFAST_NODE", "")) if text]
    if not texts:
        raise UsageError("which node? give --node HOST:PORT, or set HOLDFAST_NODE")
    try:
        addresses = tuple(Address.parse(text) for text in texts)
    except OperatorError as error:
        raise UsageError(f"--node or HOLDFAST_NODE: {error}") from error
    return Cluster(addresses, read_key(key_file))


def cluster_of(context: click.Context) -> Cluster:
    """The cluster that the root command's options name; looked up when a verb first needs it."""
    options: dict[str, Any] = context.find_root().params
    return find_cluster(options["node"], options["key"])
