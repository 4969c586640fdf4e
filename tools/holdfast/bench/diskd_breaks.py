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
        "resize-time-late",
        "T3",
        "a daemon killed at the end of a resize leaves an image whose last change nobody has noted",
        "src/diskd/shell/resizing.py",
        "            area.time_ns = max(now_ns(), intent.time_ns)\n",
        "",
        ("tests/shell/test_diskd_image_steps.py",),
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
    Break(
        "former-map-named-again",
        "B6",
        "after a power loss an AVHD's map is taken from a copy that another host had before",
        "src/diskd/core/avhd.py",
        "    yield Write(LIVE_FILE, 0, encode_live(renewed))\n    yield Sync(LIVE_FILE)\n",
        "    yield Write(LIVE_FILE, 0, encode_live(renewed))\n",
        ("tests/core/test_diskd_avhd.py",),
    ),
    Break(
        "files-closed-under-a-write",
        "S1",
        "the files of a lost image are closed while a write to them is under way",
        "src/diskd/shell/open_image.py",
        """            if session.writer is not None:
                await self.image.drain(session.writer)
        await self.stop_merging(reason)
""",
        """            pass
        await self.stop_merging(reason)
""",
        ("tests/shell/test_diskd_lease_races.py",),
    ),
    Break(
        "lost-and-merged",
        "S1",
        "a daemon goes on merging an image that is another one's by now",
        "src/diskd/shell/open_image.py",
        "        await self.stop_merging(reason)\n        async with",
        "        async with",
        ("tests/shell/test_diskd_lease_races.py",),
    ),
    Break(
        "time-set-back",
        "T4",
        "a change from outside whose time was set back is not noticed after a clean close",
        "src/diskd/core/recovery.py",
        "        if raw != was:\n",
        "        if raw.mtime_ns != was.mtime_ns:\n",
        ("tests/shell/test_diskd_image_crash.py",),
    ),
    Break(
        "end-of-a-punch-not-noted",
        "T4",
        "the end of a long punch is taken for a change from outside",
        "src/diskd/shell/raw_layer.py",
        """            await self._in_thread(change, *arguments)
        finally:
            self._on_write()
""",
        """            await self._in_thread(change, *arguments)
        finally:
            pass
""",
        ("tests/shell/test_diskd_raw_file.py",),
    ),
    Break(
        "resized-over-a-resize",
        "T2",
        "of two resizes at once the second undoes the first",
        "src/diskd/shell/resizing.py",
        "        if image.identity != before or tracker.catalogue.active + 1 != area.interval:\n",
        "        if False:\n",
        ("tests/shell/test_diskd_resizing.py",),
    ),
    Break(
        "old-intent-over-open-regions",
        "T4",
        "an intent to resize that was put back takes back the regions opened since",
        "src/diskd/core/resize.py",
        """    if any(table.open_regions):
        return True
""",
        "",
        ("tests/core/test_diskd_resize.py",),
    ),
    Break(
        "old-intent-over-a-newer-bitmap",
        "T4",
        "an intent to resize that was put back takes back what was flushed since",
        "src/diskd/core/resize.py",
        "    return root.sequence != intent.root_sequence\n",
        "    return False\n",
        ("tests/core/test_diskd_resize.py",),
    ),
    Break(
        "cancelled-flush-forgets-data",
        "B6",
        "after a flush that was called off the next one syncs nothing",
        "src/diskd/shell/overlay.py",
        "            self._is_written = True\n            self.map.dirty.update",
        "            self.map.dirty.update",
        ("tests/shell/test_diskd_overlay_ends.py",),
    ),
    Break(
        "frozen-marks-not-answered",
        "T2",
        "an answer while a cut is being recorded lacks what the frozen bitmap has",
        "src/diskd/core/tracker.py",
        "            areas.append((self.frozen.area, self.frozen.dirty))\n",
        "            pass\n",
        ("tests/core/test_diskd_tracker.py",),
    ),
    Break(
        "flushed-marks-not-answered",
        "T2",
        "an answer while the bitmap is being flushed lacks the pages that are on their way",
        "src/diskd/core/tracker.py",
        "                used[list(self._flushing.pages)] = True\n",
        "                pass\n",
        ("tests/core/test_diskd_tracker.py",),
    ),
    Break(
        "unsynced-map-forgotten",
        "B6",
        "a stop whose last flush failed removes the only map that knows the guest's last writes",
        "src/diskd/shell/overlay.py",
        "            is_clean = False  # said by",
        "            pass  # said by",
        ("tests/shell/test_diskd_overlay_ends.py",),
    ),
)
