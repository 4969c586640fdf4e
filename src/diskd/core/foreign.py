"""What an image file of somebody else's making is, and whether qemu-img may be let loose on it.

Such files can name others: a backing file, an external data file, the extents of a VMDK. A converter follows
those names wherever they point, /etc/shadow included. So a file is judged twice: by its first bytes, before
any program opens it, and by what ``qemu-img info`` then says of it. What is not known to be safe is refused.
"""

import json
import struct
from typing import Any, Final, Literal

from diskd.errors import Refused

SourceFormat = Literal["raw", "qcow2", "vhdx", "vmdk", "vdi"]

# All signatures lie in these first bytes.
HEAD_BYTES: Final = 512
INFO_BYTES_MAX: Final = 1 << 20
_VDI_SIGNATURE: Final = (0x40, b"\x7f\x10\xda\xbe")
_FORMATS: Final[tuple[tuple[int, bytes, SourceFormat], ...]] = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (*_VDI_SIGNATURE, "vdi"),
)
# Formats that we do not read. As raw they would be imported without a word, and no guest could use them.
_OTHERS: Final = (
    (b"QED\0", "a QED image", "convert it to qcow2 first: qemu-img convert -O qcow2"),
    (b"COWD", "an ESX sparse VMDK", "convert it to a single VMDK or to qcow2 first"),
    (b"conectix", "a VHD (not VHDX) image", "convert it first: qemu-img convert -f vpc -O qcow2"),
    (b"# Disk DescriptorFile", "a VMDK's descriptor, whose data lies in other files", "import the -flat.vmdk"
     " file that it names, which is raw, or export the VM with a single VMDK"),
)  # fmt: skip
_QCOW2: Final = struct.Struct(">4sIQIIQI")
_QCOW2_FEATURES: Final = struct.Struct(">Q")
_QCOW2_FEATURES_OFFSET: Final = 72
_EXTERNAL_DATA: Final = 1 << 2
_VMDK: Final = struct.Struct("<4sIIQ")


def identify(head: bytes) -> SourceFormat:
    """The format of a file that begins with ``head`` (HEAD_BYTES of it, or all). Raises Refused for what
    names other files, and for formats that are known and not read."""
    for signature, what, remedy in _OTHERS:
        if head.startswith(signature):
            raise Refused(f"it is {what}: {remedy}")
    for offset, signature, found in _FORMATS:
        if head[offset : offset + len(signature)] == signature:
            if found == "qcow2":
                _check_qcow2(head)
            elif found == "vmdk":
                _check_vmdk(head)
            return found
    return "raw"


def _check_qcow2(head: bytes) -> None:
    if len(head) < _QCOW2_FEATURES_OFFSET + _QCOW2_FEATURES.size:
        raise Refused("its qcow2 header is cut short")
    _, version, backing_offset, backing_bytes, _, _, encryption = _QCOW2.unpack_from(head)
    if backing_offset or backing_bytes:
        raise Refused("it has a backing file: flatten it first (qemu-img convert -O qcow2)")
    if encryption:
        raise Refused("it is encrypted: decrypt it first (qemu-img convert, with its secret)")
    if version >= 3:
        (features,) = _QCOW2_FEATURES.unpack_from(head, _QCOW2_FEATURES_OFFSET)
        if features & _EXTERNAL_DATA:
            raise Refused("its data lies in another file: convert it first (qemu-img convert -O qcow2)")


def _check_vmdk(head: bytes) -> None:
    if len(head) < _VMDK.size:
        raise Refused("its VMDK header is cut short")
    # With no capacity of its own, its embedded descriptor says where the data lies: in any file.
    if not _VMDK.unpack_from(head)[3]:
        raise Refused("its data lies in other files: export the VM with a single VMDK")


def virtual_size(kind: SourceFormat, path: str, document: bytes) -> int:
    """The disk's size, as ``qemu-img info --output=json`` of a file says. Raises Refused for anything in
    there that leads to another file, and for what is no such document."""
    try:
        info = json.loads(document[:INFO_BYTES_MAX])
    except (ValueError, RecursionError) as error:
        raise Refused("qemu-img info gives no JSON: is it of a version of 2.0 or later?") from error
    if not isinstance(info, dict) or info.get("format") != kind:
        raise Refused(f"qemu-img does not take it for {kind}")
    if any(key in info for key in ("backing-filename", "full-backing-filename")):
        raise Refused(f"it has a backing file: flatten it first (qemu-img convert -O {kind})")
    if info.get("encrypted"):
        raise Refused("it is encrypted: decrypt it first (qemu-img convert, with its secret)")
    _check_specific(info.get("format-specific"), path)
    size = info.get("virtual-size")
    if type(size) is not int or size <= 0:
        raise Refused("qemu-img does not tell its size, or it is empty")
    return size


def _check_specific(specific: Any, path: str) -> None:
    data = specific.get("data") if isinstance(specific, dict) else None
    if not isinstance(data, dict):
        return
    if "data-file" in data:
        raise Refused("its data lies in another file: convert it first (qemu-img convert -O qcow2)")
    extents = data.get("extents", [])
    names = [extent.get("filename") if isinstance(extent, dict) else None for extent in extents]
    if any(name != path for name in names):
        raise Refused("its data lies in other files: export the VM with a single VMDK")


def source_of(kind: SourceFormat, path: str) -> str:
    """How a converter is told to read exactly this file, in this format, and nothing that it refers to."""
    node: dict[str, Any] = {"driver": kind, "file": {"driver": "file", "filename": path}}
    if kind in ("qcow2", "vmdk"):
        node["backing"] = None  # The others have none, and the option is unknown to them.
    return "json:" + json.dumps(node)


def percent_of(text: str) -> float | None:
    """The newest progress in what ``qemu-img convert -p`` has printed, from 0 to 100."""
    end = text.rfind("/100%)")
    start = text.rfind("(", 0, end)
    if end < 0 or start < 0:
        return None
    try:
        percent = float(text[start + 1 : end])
    except ValueError:
        return None
    return percent if 0 <= percent <= 100 else None
