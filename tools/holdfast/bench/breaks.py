"""The rules of DESIGN.md section 4, each with an edit that breaks it and the tests that must notice."""

import attrs


@attrs.frozen
class Break:
    """``old`` occurs exactly once in ``file``; with ``new`` in its place the rule is broken."""

    name: str
    rule: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_TRACKING_TESTS = (
    "tests/core/test_diskd_tracking_crash.py",
    "tests/shell/test_diskd_image.py",
    "tests/shell/test_diskd_image_damage.py",
)
_POWER_TESTS = ("tests/shell/test_crash_directed.py",)
_OVERLAY_TESTS = ("tests/core/test_diskd_overlay_crash.py", "tests/core/test_diskd_avhd.py")

BREAKS: tuple[Break, ...] = (
    Break(
        "stale-epoch-admitted",
        "S1",
        "diskd lets a fenced epoch connect again",
        "src/diskd/core/lease.py",
        'raise Refused(f"epoch {epoch} is not the lease of this image:',
        'return Claim(epoch)  # (f"',
        ("tests/core/test_diskd_lease.py", "tests/property/test_diskd_lease_avhd.py"),
    ),
    Break(
        "lease-not-durable",
        "S1",
        "a lease is acknowledged before it is durable",
        "src/diskd/core/lease.py",
        "        yield from persist(new)\n",
        "        yield from ()\n",
        ("tests/core/test_diskd_lease.py",),
    ),
    Break(
        "held-lock-overruled",
        "S1",
        "an image is opened although another daemon holds its lock",
        "src/diskd/core/ownership.py",
        "    if not lock_is_free:\n",
        "    if False:\n",
        ("tests/core/test_diskd_ownership.py",),
    ),
    Break(
        "other-host-believed-dead",
        "S1",
        "an image of another host's daemon is taken over without anybody's word that the host is fenced",
        "src/diskd/core/ownership.py",
        '("other_host", "open"): "refuse_other_host",',
        '("other_host", "open"): "open",',
        ("tests/core/test_diskd_ownership.py",),
    ),
    Break(
        "owner-record-overwritten",
        "S1",
        "of two daemons that take an image at once, both believe that they have it",
        "src/diskd/core/ownership.py",
        "            yield Create(name, encode(owner))\n",
        "            yield Remove(name)\n            yield Create(name, encode(owner))\n",
        ("tests/core/test_diskd_ownership.py",),
    ),
    Break(
        "slept-through-takeovers",
        "S1",
        "a daemon that slept while others took an image believes its old number",
        "src/diskd/core/ownership.py",
        "        if numbers[-1] != owner.number:\n",
        "        if False:\n",
        ("tests/core/test_diskd_ownership.py",),
    ),
    Break(
        "lost-image-answers",
        "S1",
        "a daemon that has lost an image answers a change of its lease",
        "src/diskd/core/lease.py",
        """    owner = yield from ownership.check(owner)
    new = yield from change(state, decision, epoch, holder)
    if new is not state:
        owner = yield from ownership.note_lease(owner, new.sequence, new.epoch)
""",
        "    new = yield from change(state, decision, epoch, holder)\n",
        ("tests/core/test_diskd_ownership.py", "tests/shell/test_diskd_owners.py"),
    ),
    Break(
        "older-lease-believed",
        "S1",
        "an older copy of the lease file, put back, brings an ended epoch back",
        "src/diskd/core/ownership.py",
        "    if sequence < owner.lease_sequence or epoch < owner.lease_epoch:\n",
        "    if False:\n",
        ("tests/core/test_diskd_ownership.py", "tests/shell/test_diskd_owners.py"),
    ),
    Break(
        "submitted-not-awaited",
        "S1",
        "a lease is answered while a write of an older epoch may still land",
        "src/diskd/shell/open_image.py",
        """                if session.writer is not None:
                    await self.image.drain(session.writer)
                self._sessions.remove(session)
""",
        "                self._sessions.remove(session)\n",
        ("tests/shell/test_diskd_lease_races.py",),
    ),
    Break(
        "half-moved-checkpoint-merged",
        "B1",
        "an image is merged under a frozen view whose other image is with another daemon",
        "src/diskd/shell/checkpoint_recovery.py",
        "if overlay is None or overlay.merge is not None or self.waits(image):",
        "if overlay is None or overlay.merge is not None:",
        ("tests/shell/test_diskd_owners.py",),
    ),
    Break(
        "mark-after-write",
        "T1",
        "data reaches the image before its region is durably open",
        "src/diskd/shell/writer.py",
        """            await self._admitted(offset, len(data))
            with _Submitted(self, changes=True):
                await self.image.layer.write(offset, data)
""",
        """            with _Submitted(self, changes=True):
                await self.image.layer.write(offset, data)
            await self._admitted(offset, len(data))
""",
        _TRACKING_TESTS,
    ),
    Break(
        "mark-not-durable",
        "T1",
        "a region counts as open before its record in the MRT is synced",
        "src/diskd/core/mrt.py",
        """        yield Write(FILE, offset, encode_record(generation, record))
    yield Sync(FILE)
""",
        """        yield Write(FILE, offset, encode_record(generation, record))
""",
        _POWER_TESTS,
    ),
    Break(
        "point-before-content",
        "T2",
        "a point is recorded before what its backup has read is durable",
        "src/diskd/shell/cut.py",
        "                await image.raw.flush()\n",
        "                await trio.lowlevel.checkpoint()\n",
        _POWER_TESTS,
    ),
    Break(
        "map-not-durable",
        "B6",
        "FLUSH answers before the AVHD's map is durable",
        "src/diskd/core/avhd.py",
        """        yield from _write_sectors(sectors)
        yield from final_sync(MAP_FILE)
""",
        """        yield from _write_sectors(sectors)
""",
        _POWER_TESTS,
    ),
    Break(
        "roots-name-not-durable",
        "B6",
        "images are created in a directory whose own name is not durable",
        "src/diskd/shell/library.py",
        "        durable.sync_directory(root)  # what",
        "        # what",
        _POWER_TESTS,
    ),
    Break(
        "region-closed-too-early",
        "T2",
        "a region closes although it was marked since its page was copied",
        "src/diskd/core/tracker.py",
        "if self._open[region] and not self._changed[region]:",
        "if self._open[region]:",
        _TRACKING_TESTS,
    ),
    Break(
        "marks-turned-off",
        "T1",
        "a write is admitted although one of its regions is closed",
        "src/diskd/core/tracker.py",
        "        if self._open.find(0, first, last + 1) >= 0:\n            return False\n",
        "",
        ("tests/core/test_diskd_tracking_crash.py",),
    ),
    Break(
        "closed-on-disk-first",
        "T2",
        "a region stays open in memory while its closing record is written",
        "src/diskd/core/tracker.py",
        "                self._open[region] = 0\n                self._closing.add(region)\n",
        "                self._closing.add(region)\n",
        ("tests/core/test_diskd_tracking_crash.py",),
    ),
    Break(
        "joined-a-begun-commit",
        "T1",
        "a first touch joins a sync of the MRT that has begun without its region",
        "src/diskd/core/tracker.py",
        "        self._wanted.update(dict.fromkeys(regions))\n",
        """        if self._committing is not None:
            for region in regions:
                if not self._durable_open[region]:
                    self._durable_open[region] = 1
                    self._durable_count += 1
                    self._committing.opening.append(region)
            return
        self._wanted.update(dict.fromkeys(regions))
""",
        ("tests/core/test_diskd_tracking_crash.py",),
    ),
    Break(
        "resize-not-recorded",
        "T2",
        "a resize is carried out before its intent is durable",
        "src/diskd/core/resize.py",
        "    yield Replace(FILE, encode_intent(tracker.identity, intent))\n",
        "    yield from ()\n",
        ("tests/core/test_diskd_resize.py",),
    ),
    Break(
        "older-mrt-believed",
        "T4",
        "an MRT put back from before the last open regions is believed after a power loss",
        "src/diskd/core/recovery.py",
        "    if not header.clean and around.mrt_changed_ns > stamped_ns + WRITE_NS_MAX:\n",
        "    if False:\n",
        ("tests/core/test_diskd_rollback.py",),
    ),
    Break(
        "older-interval-believed",
        "T4",
        "the file of an interval from before a join is believed",
        "src/diskd/core/interval.py",
        "    if through < segment.through:\n",
        "    if False:\n",
        ("tests/core/test_diskd_rollback.py", "tests/core/test_diskd_side_files.py"),
    ),
    Break(
        "merge-clears-before-sync",
        "B6",
        "the map's entries are cleared before the parent's copy is durable",
        "src/diskd/core/merge.py",
        "                offset += length\n        yield from final_sync(PARENT_FILE)\n",
        "                offset += length\n",
        _OVERLAY_TESTS,
    ),
    Break(
        "written-block-stays-in-batch",
        "B6",
        "a block that the guest rewrote during the copy is cleared all the same",
        "src/diskd/core/merge.py",
        "self.batch.difference_update(range(first, first + count))",
        "pass",
        _OVERLAY_TESTS,
    ),
    Break(
        "quick-write-overtakes-a-clearing",
        "B6",
        "a write in place goes to the AVHD although the clearing of its entry has been submitted",
        "src/diskd/core/overlay.py",
        "        if merge.must_wait(first, count):\n            return None\n        if state == PARENT:",
        "        if state == PARENT:",
        ("tests/property/test_diskd_overlay_plans.py",),
    ),
    Break(
        "map-before-data",
        "B6",
        "FLUSH makes the map durable before the AVHD's data",
        "src/diskd/core/avhd.py",
        "    yield from final_sync(DATA_FILE)\n    if sectors:\n",
        "    if sectors:\n",
        _OVERLAY_TESTS,
    ),
    Break(
        "not-invalidated",
        "B2",
        "a write that the AVHD cannot take goes to the parent, and the checkpoint is still believed",
        "src/diskd/shell/checkpoints.py",
        "                await held.files.run(checkpoint.invalidate(held.record))\n"
        "            held.invalid = True\n",
        "                await trio.lowlevel.checkpoint()\n",
        ("tests/shell/test_diskd_library.py", "tests/shell/test_diskd_overlay.py"),
    ),
    Break(
        "acknowledgement-lost-means-failed",
        "B3",
        "a backup whose acknowledgement was lost is discarded at the source",
        "src/diskd/shell/backup.py",
        'return "pending" if session is not None and session.may_have_committed else "discard"',
        'return "discard"',
        ("tests/shell/test_diskd_backup.py", "tests/interop/test_diskd_backup_chain.py"),
    ),
    Break(
        "digest-unchecked",
        "B4",
        "the target believes a frame whose bytes do not match its digest",
        "src/diskd/core/stream.py",
        "if self.header.kind is FrameKind.DATA and blake3(self.data).digest() != self.header.digest:",
        "if False:",
        ("tests/property/test_diskd_stream.py", "tests/shell/test_diskd_backup.py"),
    ),
    Break(
        "received-unchecked",
        "B4",
        "the target writes frames whose bytes do not match their digests",
        "src/diskd/core/stream_frames.py",
        "if blake3(self.payload(number, length)).digest() != expected:",
        "if False:",
        ("tests/property/test_diskd_stream_batches.py", "tests/shell/test_diskd_target.py"),
    ),
    Break(
        "recorded-before-durable",
        "B4",
        "what is left of an interrupted export is recorded, and acknowledged, before it is durable",
        "src/diskd/shell/incoming.py",
        "        for descriptor in snapshot.descriptors:\n            self._files.sync(descriptor)\n",
        "",
        ("tests/shell/test_diskd_resume_files.py",),
    ),
    Break(
        "resumed-on-another-plan",
        "B4",
        "an export goes on behind what another plan has sent",
        "src/diskd/shell/repository.py",
        "if found is not None and found[1].opening_digest != opening_digest(opening):",
        "if False:",
        ("tests/shell/test_diskd_resume_files.py",),
    ),
    Break(
        "resumed-and-discarded",
        "B3",
        "a resumed backup that is refused at once is discarded: its predecessor may have sent it all",
        "src/diskd/shell/backup.py",
        "if resuming and not self.has_been_ready:",
        "if False:",
        ("tests/shell/test_diskd_resume.py",),
    ),
    Break(
        "resumed-without-looking",
        "B4",
        "a source goes on behind whatever the target says it has",
        "src/diskd/shell/producing.py",
        "if self._next is None or run != (self._next.kind, self._next.offset, self._next.length):",
        "if self._next is None:",
        ("tests/shell/test_diskd_resume.py",),
    ),
    Break(
        "committed-without-sync",
        "B5",
        "a point gets its name before its index is durable",
        "src/diskd/shell/incoming.py",
        "        self._files.sync(self._index)\n",
        "",
        ("tests/shell/test_diskd_repository.py",),
    ),
    Break(
        "commit-not-durable",
        "B5",
        "a backup is acknowledged before its name is durable",
        "src/diskd/shell/incoming.py",
        "            self._files.sync_directory(self._directory)\n",
        "            self._files.sync_directory\n",
        _POWER_TESTS,
    ),
    Break(
        "pruned-unverified",
        "B5",
        "older points are removed although what is kept was not read again",
        "src/diskd/shell/repository.py",
        "            self._check_kept(vm, plan.wanted, poll)\n",
        "",
        ("tests/shell/test_diskd_prune.py",),
    ),
    Break(
        "snapshot-of-a-failed-checkpoint",
        "B2",
        "a snapshot is believed although the checkpoint had failed before it was there",
        "src/diskd/shell/san.py",
        "                await trio.to_thread.run_sync(live.allocation_blocking, 0, 1)\n",
        "",
        ("tests/shell/test_diskd_san_mode.py",),
    ),
    Break(
        "bases-removed-first",
        "B5",
        "a prune removes bases before what builds on them",
        "src/diskd/core/retention.py",
        "for manifest in reversed(ordered) if manifest.point not in reasons]",
        "for manifest in ordered if manifest.point not in reasons]",
        ("tests/core/test_diskd_retention.py",),
    ),
    Break(
        "fenced-in-place",
        "S1",
        "small reads and writes of a connection are carried out without a look at its epoch",
        "src/diskd/shell/writer.py",
        "    def begin_in_place(self) -> bool:\n        self._begin()\n",
        "    def begin_in_place(self) -> bool:\n",
        ("tests/shell/test_diskd_in_place.py",),
    ),
    Break(
        "marked-is-enough",
        "T1",
        "a block that is marked is written although its region has been closed since",
        "src/diskd/core/tracker.py",
        "            self._open[first]\n            and self.area.bits",
        "            self.area.bits",
        ("tests/shell/test_diskd_in_place.py",),
    ),
    Break(
        "in-place-through-a-hold",
        "B1",
        "small writes go on while a cut is being made",
        "src/diskd/shell/writer.py",
        "if image.is_held or not image.tracker.admit(offset, len(data)):\n            return False",
        "if not image.tracker.admit(offset, len(data)):\n            return False",
        ("tests/shell/test_diskd_in_place.py",),
    ),
    Break(
        "zeroes-not-in-memory",
        "T2",
        "a kill in the middle of writing zeroes tears a sector, which every disk promises not to do",
        "src/diskd/shell/files.py",
        "    return memoryview(mmap.mmap(-1, 1 << 20, flags=flags)).toreadonly()\n",
        "    return memoryview(bytes(1 << 20))\n",
        ("tests/shell/test_diskd_files.py",),
    ),
)
