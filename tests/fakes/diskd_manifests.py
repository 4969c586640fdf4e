"""Manifests of made-up points, for the rules over them."""

from diskd.core.catalog import DiskRecord, FileDigest, Manifest


def name(number):
    return f"rp-{number:016x}"


def manifest(number, base=None, *, disks=("system",), at=None):
    return Manifest(
        vm="web",
        point=name(number),
        base=None if base is None else name(base),
        kind="full" if base is None else "differential",
        consistency="crash",
        committed_at=at or f"2026-01-01T00:00:{number:02d}+00:00",
        synthetic=False,
        source_digest="ab",
        export_digest="ab",
        config=FileDigest("vm.toml", 1, "cd"),
        index=FileDigest("export.index", 1, "cd"),
        disks=[
            DiskRecord(d, d, 1 << 20, 4096, 65536, 0, 0, True, 0, "ef", FileDigest(f"{d}.qcow2", 1, "cd"))
            for d in disks
        ],
    )


def points(*manifests):
    return {m.point: m for m in manifests}
