"""More breaks, of rules T1 to T5, S1 and B1 to B6 in diskd: what a review by small edits found unguarded."""

from holdfast.bench.breaks import Break

DISKD_BREAKS: tuple[Break, ...] = (
    Break(
        "stamp-not-renewed",
        "T4",
        "a write of the MRT outlives its stamp, and the file is taken for one that was put back",
        "src/diskd/shell/image.py",
        "                if mrt.has_outlived_stamp(began_ns, self.clock()):\n",
        "                if False:\n",
        ("tests/shell/test_diskd_image_trouble.py",),
    ),
    Break(
        "resize-time-live",
        "T3",
        "the growing of the raw file, while it is served, is taken for a change from outside",
        "src/diskd/shell/resizing.py",
        "            area.time_ns = now_ns()\n",
        "",
        ("tests/shell/test_diskd_resizing.py",),
    ),
    Break(
        "leave-unclean-unsynced",
        "S1",
        "a failed image is given away while this host may still write to it what it has in memory",
        "src/diskd/shell/owning.py",
        "        await trio.to_thread.run_sync(_sync_all, self._files.directory)\n",
        "",
        ("tests/shell/test_diskd_handover.py",),
    ),
    Break(
        "changes-not-retried",
        "T4",
        "a question about changes that a join of intervals overtakes is refused",
        "src/diskd/shell/image.py",
        "        if self.tracker.catalogue is catalogue:\n",
        "        if True:\n",
        ("tests/shell/test_diskd_image_trouble.py",),
    ),
    Break(
        "newest-swept-first",
        "S1",
        "a sweep that is cut short leaves a former owner of an image in the belief that it has it",
        "src/diskd/core/ownership.py",
        "        for number in numbers[:-1]:",
        "        for number in reversed(numbers[:-1]):",
        ("tests/core/test_diskd_ownership.py",),
    ),
    Break(
        "any-run-of-that-name",
        "S1",
        "an older run of a daemon takes a newer run's owner record for its own",
        "src/diskd/core/ownership.py",
        "            if newest is None or newest.daemon.instance != owner.daemon.instance:\n",
        "            if newest is None or newest.daemon.name != owner.daemon.name:\n",
        ("tests/core/test_diskd_ownership.py",),
    ),
    Break(
        "lost-lease-forgotten",
        "S1",
        "a lease that was declared lost, found again, brings its ended epoch back",
        "src/diskd/core/lease.py",
        "    return (yield from ownership.note_lease(owner, state.sequence, epoch)), state\n",
        "    return owner, state\n",
        ("tests/core/test_diskd_ownership.py",),
    ),
)
