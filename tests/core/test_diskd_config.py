"""diskd's settings: units, bounds, unknown keys."""

from pathlib import Path

import pytest

from daemonkit.errors import OperatorError
from daemonkit.units import SECOND, GiB, MiB
from diskd.config import Settings, load_settings, show_settings


def test_defaults_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "diskd.toml"
    file.write_text('tracking_flush_interval = "2s"\navhd_limit = "10GiB"\nnbd_connections = 9\n')
    assert load_settings(None) == Settings()
    settings = load_settings(file, ["tracking_flush_interval=250ms", "max_open_bytes = 1GiB"])
    assert settings.tracking_flush_interval == SECOND // 4
    assert settings.avhd_limit == 10 * GiB
    assert settings.nbd_connections == 9
    assert load_settings(file, ["avhd_limit=none"]).avhd_limit is None
    library = settings.library()
    assert library.tracking_flush_interval_ns == SECOND // 4
    assert library.max_open_bytes == GiB
    assert library.merge_batch_bytes == 4 * MiB


def test_shown_in_seconds_and_bytes() -> None:
    shown = show_settings(load_settings(None, ["tracking_flush_interval=1500ms"]))
    assert shown["tracking_flush_interval"] == 1.5
    assert shown["max_open_bytes"] == 4 * GiB
    assert shown["avhd_limit"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tracking_flush_intervall=5s", "did you mean 'tracking_flush_interval'"),
        ("zzz=1", "known: tracking_flush_interval"),
        ("tracking_flush_interval", "KEY=VALUE"),
        ("tracking_flush_interval=5", "is not a duration"),
        ("tracking_flush_interval=0s", "not between 100ms and 1h"),
        ("tracking_flush_interval=none", "is not a duration"),
        ("max_open_bytes=lots", "is not a size"),
        ("max_open_bytes=1KiB", "not between 64MiB and 1024TiB"),
        ("nbd_connections=many", "is no number"),
        ("shared_dir=relative", "no absolute path"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override: str, message: str) -> None:
    with pytest.raises(OperatorError, match=message) as caught:
        load_settings(None, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = [", "not TOML"),
        ("tracking_flush_interval = 5", "in quotes"),
        ("nbd_connectoins = 5", "did you mean 'nbd_connections'"),
        ("avhd_limit = true", "is no size"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "diskd.toml"
    file.write_text(content)
    with pytest.raises(OperatorError, match=message) as caught:
        load_settings(file)
    assert str(file) in str(caught.value)
    with pytest.raises(OperatorError, match="No such file"):
        load_settings(tmp_path / "absent.toml")
