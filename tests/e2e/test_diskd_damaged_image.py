"""An image that cannot be read: its JSON has nulls, its reason words, and nobody is hurt by it."""

import shutil

import pytest
from diskd_process import diskd

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_what_is_not_known_is_null_and_said_in_words(tmp_path):
    root = tmp_path / "root"
    async with diskd(root, "--metrics", "127.0.0.1:0") as daemon:
        for name in ("a", "b", "c"):
            await daemon.do("image", "create", name, "1MiB")
        await daemon.end()
        (root / "images/a/image.toml").write_text("nonsense")
        (root / "images/b/disk.raw").unlink()
        (root / "images/b/disk.raw").mkdir()
        await daemon.start()
        a, b, c = await daemon.json("image", "list")
        for name in ("uuid", "size", "block_size", "region_size", "points", "checkpoint", "merge_remaining"):
            assert a[name] is None, name
        assert (a["state"], b["state"], c["state"]) == ("damaged", "damaged", "open")
        assert b["size"] == 1 << 20 and b["points"] is None and c["points"] == 0
        assert "Is a directory" in b["reason"]
        text = await daemon.do("image", "list")
        assert "damaged" in text
        shown = await daemon.json("show", "a")
        assert shown["io"] is None and shown["clients"] == []
        await daemon.do("show")
        line = await daemon.refuses("checkpoint", "begin", "--vm", "b", "--image", "b")
        shutil.rmtree(root / "images/b/disk.raw")
        line += await daemon.refuses("image", "open", "b")
        assert "[Errno" not in line + str(b) + daemon.log()


async def test_a_daemon_that_is_not_there_is_named_with_what_to_try(tmp_path):
    async with diskd(tmp_path / "root") as daemon:
        address = daemon.ready["control"]
        await daemon.end()
        line = await daemon.refuses("image", "list")
        assert address in line and "does its daemon run" in line
