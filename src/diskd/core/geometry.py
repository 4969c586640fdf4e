"""The fixed facts of one image, and how blocks, regions and bitmap pages relate.

    image    |  region 0  |  region 1  |  ...            region: coarse, one bit in the MRT
             |b|b|b|b|b|b|b|b|b|b|b|b|                   block: fine, one bit in a bitmap
    bitmap   |        page 0         |  page 1  | ...    page: the unit that the RCT copies on write

A region's bits never straddle a page, so that one copied page is all that a region needs to close.
"""

import math
import tomllib
from typing import Final
from uuid import UUID

import attrs

from daemonkit.schema import SchemaError, structure
from daemonkit.units import KiB, MiB, TiB, format_size
from diskd.errors import Damaged, Refused

BLOCK_BYTES_DEFAULT: Final = 4 * KiB
REGION_BYTES_DEFAULT: Final = 1 * MiB
PAGE_BYTES_DEFAULT: Final = 4 * KiB
SECTOR_BYTES: Final = 512
# 64 TiB at 4 KiB blocks needs two 2 GiB bitmaps; beyond that the block size should grow instead.
SIZE_BYTES_MAX: Final = 64 * TiB
BLOCK_COUNT_MAX: Final = 1 << 34
BLOCK_BYTES_MAX: Final = 1 * MiB
REGION_BYTES_MAX: Final = 128 * MiB
IMAGE_TOML: Final = "image.toml"
RAW: Final = "disk.raw"


def _is_power(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@attrs.frozen
class Geometry:
    """Sizes of an image and everything derived from them. Made by ``Geometry.check``."""

    size_bytes: int
    block_bytes: int
    region_bytes: int
    page_bytes: int = PAGE_BYTES_DEFAULT

    @classmethod
    def check(
        cls, size_bytes: int, block_bytes: int, region_bytes: int, page_bytes: int = PAGE_BYTES_DEFAULT
    ) -> "Geometry":
        """Raises Refused with the reason for sizes that cannot be."""
        if not _is_power(block_bytes) or not SECTOR_BYTES <= block_bytes <= BLOCK_BYTES_MAX:
            raise Refused(f"block size {block_bytes}: choose a power of two from 512 to 1MiB")
        if not _is_power(page_bytes) or not SECTOR_BYTES <= page_bytes <= MiB:
            raise Refused(f"bitmap page size {page_bytes}: choose a power of two from 512 to 1MiB")
        # Whole bytes of the bitmap, and not across a page.
        low, high = 8 * block_bytes, min(8 * page_bytes * block_bytes, REGION_BYTES_MAX)
        if not _is_power(region_bytes) or not low <= region_bytes <= high:
            raise Refused(
                f"region size {region_bytes}: choose a power of two"
                f" from {format_size(low)} to {format_size(high)}"
            )
        if size_bytes <= 0 or size_bytes % SECTOR_BYTES:
            raise Refused(f"image size {size_bytes}: choose a positive multiple of 512 bytes")
        if size_bytes > SIZE_BYTES_MAX or size_bytes // block_bytes > BLOCK_COUNT_MAX:
            raise Refused(f"image size {size_bytes}: at most 64TiB, and 2^34 blocks")
        return cls(size_bytes, block_bytes, region_bytes, page_bytes)

    @property
    def block_count(self) -> int:
        return -(-self.size_bytes // self.block_bytes)

    @property
    def region_count(self) -> int:
        return -(-self.size_bytes // self.region_bytes)

    @property
    def page_count(self) -> int:
        return -(-self.block_count // (8 * self.page_bytes))

    @property
    def bitmap_bytes(self) -> int:
        """Whole pages; bits beyond the last block stay zero."""
        return self.page_count * self.page_bytes

    @property
    def region_bitmap_bytes(self) -> int:
        """How many bytes of the bitmap one region has."""
        return self.region_bytes // self.block_bytes // 8

    @property
    def block_shift(self) -> int:
        return int(math.log2(self.block_bytes))

    @property
    def region_shift(self) -> int:
        return int(math.log2(self.region_bytes))


@attrs.frozen
class Identity:
    """Which image this is: what every side file must carry to be believed."""

    uuid: UUID
    geometry: Geometry


@attrs.frozen
class _ImageToml:
    uuid: str
    size: int
    block: int
    region: int
    page: int = PAGE_BYTES_DEFAULT


def encode_identity(identity: Identity) -> bytes:
    """The text of image.toml."""
    geometry = identity.geometry
    return (
        "# A virtual disk of diskd. Written once; not meant for editing.\n"
        f'uuid = "{identity.uuid}"\n'
        f"size = {geometry.size_bytes}\n"
        f"block = {geometry.block_bytes}\n"
        f"region = {geometry.region_bytes}\n"
        f"page = {geometry.page_bytes}\n"
    ).encode()


def decode_identity(data: bytes, *, where: str = IMAGE_TOML) -> Identity:
    """Raises Damaged for anything that ``encode_identity`` did not write."""
    try:
        table = structure(_ImageToml, tomllib.loads(data.decode()), where=where)
        geometry = Geometry.check(table.size, table.block, table.region, table.page)
        return Identity(UUID(table.uuid), geometry)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, SchemaError, Refused, ValueError) as error:
        raise Damaged(f"{where}: {error}; restore the file from the backup of this host") from error
