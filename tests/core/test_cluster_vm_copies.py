"""Where a VM is backed up, and what a restored one is called."""

import pytest
from clusterd_story import Story, vm

from clusterd.config import parse_vm, renamed_vm
from clusterd.core import commands as c
from clusterd.core.node import NodeCore
from clusterd.core.types import Disk
from clusterd.core.vm_copies import BackupPlace, check_restored, restored_names
from clusterd.errors import Refused
from daemonkit.errors import OperatorError
from daemonkit.units import SECOND


def core_of(story: Story, node: str) -> NodeCore:
    core = story.world.hosts[node].core
    assert core is not None
    return core


def place(story: Story, node: str) -> BackupPlace:
    return core_of(story, node).backup_place("web", story.world.now)


def test_a_backup_runs_at_the_owner_whatever_node_is_asked_and_follows_the_vm() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    story.world.run_for(SECOND)
    assert {(place(story, n).node, place(story, n).epoch) for n in ("n1", "n2", "n3")} == {
        ("n1", first["epoch"])
    }

    before = place(story, "n1")
    assert not core_of(story, "n1").has_gone_elsewhere("web", before)
    story.command(c.MoveVm("web", "n2"))
    moved = story.online(on="n2")
    story.world.run_for(SECOND)
    assert core_of(story, "n1").has_gone_elsewhere("web", before)
    assert {(place(story, n).node, place(story, n).epoch) for n in ("n1", "n2", "n3")} == {
        ("n2", moved["epoch"])
    }


def test_a_restart_in_place_is_another_run() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    before = place(story, "n1")
    story.command(c.StopVm("web"))
    story.until(lambda s: s["vms"]["web"]["state"] == "offline")
    story.command(c.StartVm("web"))
    story.online(on="n1")
    story.world.run_for(SECOND)
    assert core_of(story, "n1").has_gone_elsewhere("web", before)


def test_a_stopped_vm_is_backed_up_at_the_node_that_was_asked() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.command(c.StopVm("web"))
    story.until(lambda s: s["vms"]["web"]["state"] == "offline")
    story.world.run_for(SECOND)
    for node in ("n1", "n2", "n3"):
        assert (place(story, node).node, place(story, node).epoch) == (node, 0)
        assert not core_of(story, node).has_gone_elsewhere("web", place(story, node))


def test_an_owner_out_of_reach_is_named_and_so_is_ones_own_isolation() -> None:
    story = Story(resiliency_period="60s")
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.do("isolate n1")
    story.until(lambda s: s["vms"]["web"]["state"] == "unmonitored")
    with pytest.raises(Refused, match="belongs to node n1, which is isolated"):
        place(story, "n2")
    with pytest.raises(Refused, match="n1, is isolated and cannot tell"):
        place(story, "n1")


def test_what_cannot_be_backed_up_is_refused() -> None:
    story = Story()
    with pytest.raises(Refused, match="there is no VM 'web'"):
        place(story, "n1")
    story.command(c.AddVm(vm(disks=(), stateless=True)))
    story.online()
    story.world.run_for(SECOND)
    with pytest.raises(Refused, match="has no disks"):
        place(story, "n1")


def test_names_of_restored_images() -> None:
    assert restored_names("web", None, {"a": "web-a", "b": "x"}) == {"a": "web-a", "b": "x"}
    assert restored_names("web", "web", {"a": "web-a"}) == {"a": "web-a"}
    assert restored_names("web", "web2", {"a": "web-a"}) == {"a": "web2"}
    assert restored_names("web", "web2", {"a": "web-a", "b": "x"}) == {"a": "web2-a", "b": "web2-b"}
    with pytest.raises(Refused, match="1 to 63"):
        restored_names("web", "w" * 60, {"disk": "a", "other": "b"})


FILE = """# the shop's front
name = "web"  # do not rename
argv = ["guest", "{disk:root}"]
memory = "1GiB"

[[disks]]
name = "root"   # boots
image = "web-root"

[[disks]]
name = "data"
image = "web-data"
diskd = "other"
"""


def test_a_renamed_vm_file_keeps_everything_else() -> None:
    text = FILE.replace('image = "web-root"', 'image = "web-root"\ndiskd = "other"')
    images = {"root": "web2-root", "data": "web2-data"}
    renamed = renamed_vm(text, name="web2", images=images, diskd="main")
    config = parse_vm(renamed, where="test")
    assert (config.name, config.disks) == (
        "web2",
        (Disk("root", "web2-root", "main"), Disk("data", "web2-data", "main")),
    )
    assert (
        renamed.startswith("# the shop's front\n") and "# boots" in renamed and "# do not rename" in renamed
    )
    assert parse_vm(text, where="test").argv == config.argv
    assert check_restored(config, ["web2-data", "web2-root"]) is config
    with pytest.raises(Refused, match="uses the images web2-data, web2-root"):
        check_restored(config, ["web2-root"])


def test_a_vm_file_that_is_none_is_refused() -> None:
    for text in ("", "name = 1", 'name = "web"', "no toml"):
        with pytest.raises(OperatorError, match="the backup's VM file"):
            renamed_vm(text, name="x", images={}, diskd="main")


@pytest.mark.parametrize("once_asked", [False, True])
@pytest.mark.parametrize("is_back", [False, True])
def test_a_command_whose_writing_was_not_answered_may_have_been_recorded(
    once_asked: bool, is_back: bool
) -> None:
    """Also where the next look finds its own VM there, and calls it a namesake."""
    story = Story()
    world, core = story.world, core_of(story, "n2")
    ticket = world.command("n2", c.AddVm(vm()))
    if once_asked:
        assert world.run_while(
            lambda: not core.store.is_writing("command", str(ticket)), world.now + 8 * SECOND
        )
    story.do("cut n2 store")
    if is_back:
        world.run_for(SECOND // 2)
        story.do("heal n2 store")
    assert world.run_while(lambda: ticket not in world.answers, world.now + 60 * SECOND)
    answer = world.answers[ticket]
    story.do("heal n2 store")
    world.run_for(5 * SECOND)
    is_there = core.vm_config("web") is not None
    assert answer.accepted or answer.is_unknown or not is_there
    assert not (answer.is_unknown and not once_asked)
