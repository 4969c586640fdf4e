"""More breaks, of rules B3 to B5 at the backup target and in what is read from it."""

from holdfast.bench.breaks import Break

TARGET_BREAKS: tuple[Break, ...] = (
    Break(
        "pruned-name-comes-back",
        "B5",
        "the files of a pruned point go before it is durable that it has no name any more",
        "src/diskd/shell/repository_files.py",
        "        os.rename(point, temporary)\n        self.sync_directory(point.parent)\n",
        "        os.rename(point, temporary)\n",
        ("tests/shell/test_diskd_prune.py",),
    ),
    Break(
        "filling-unverified",
        "B4",
        "what the target puts around an export's data is not compared with the base before the commit",
        "src/diskd/shell/verify.py",
        "        self._check_filling(self._layer.frames)\n",
        "",
        ("tests/shell/test_diskd_verify.py",),
    ),
    Break(
        "damaged-base-ignored",
        "B4",
        "a point is called good although what it builds on is damaged",
        "src/diskd/shell/repository.py",
        "        if len(chain) > 1 and chain[1].point in damaged:\n",
        "        if False:\n",
        ("tests/shell/test_diskd_verify.py",),
    ),
    Break(
        "restored-unverified",
        "B4",
        "a restore writes frames whose bytes do not match their digests",
        "src/diskd/shell/restore.py",
        "        frame.check()\n        _, disk",
        "        _, disk",
        ("tests/shell/test_diskd_restore.py",),
    ),
    Break(
        "settled-and-committed",
        "B3",
        "a stream goes on although its source was told that its point is not committed",
        "src/diskd/shell/target.py",
        "            receiving.unwanted = True\n"
        '            await self._end(receiving, "its source settles the point")\n',
        "            pass\n",
        ("tests/shell/test_diskd_settling.py",),
    ),
)
