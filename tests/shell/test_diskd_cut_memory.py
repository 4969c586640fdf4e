"""What a daemon keeps in memory does not grow with the number of its backups."""

from pathlib import Path

from image_harness import MiB, cut, new_place, open_image

from diskd.shell.image import Image


def mappings():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("/holdfast-" in line for line in lines)


async def test_a_cut_leaves_no_bitmap_mapped_behind(tmp_path):
    """It was 32 MiB per TiB and backup, until the image was closed."""
    before = mappings()
    with new_place(tmp_path) as place:
        await Image.create(place.directory, 8 * MiB)
        async with open_image(place) as image:
            counts = []
            for number in range(3):
                await cut(image, number)
                counts.append(mappings() - before)
                await image.prepare_cut()
                await image.cancel_cut()
                counts.append(mappings() - before)
        assert counts == [counts[0]] * 6
    assert mappings() == before
