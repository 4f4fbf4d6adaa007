"""Settings: files, overrides, and messages that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.config_io import config_hash, dump_yaml, load_config, parse_override
from training.prepare.config import PrepareConfig, check_config

PATHS = ["input=photos", "output=data"]


def test_file_and_overrides_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "prepare.yaml"
    path.write_text("input: [a, b]\noutput: out\nselect: {max_faces: 3, min_side: 256}\n")
    config = load_config(PrepareConfig, path, ["select.min_side=1024", "captions.required=true"])
    assert (config.input, config.select.max_faces, config.select.min_side) == (("a", "b"), 3, 1024)
    assert config.captions.required


def test_dump_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    config = load_config(PrepareConfig, None, [*PATHS, "split.val=0.25", "identity.regex=^(\\w+)_"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(config))
    again = load_config(PrepareConfig, path)
    assert again == config and config_hash(again) == config_hash(config)
    assert config_hash(config) != config_hash(load_config(PrepareConfig, None, PATHS))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("select.min_sid=5", ["select.min_sid", "unknown", "select.min_side"]),
        ("selct.min_side=5", ["unknown", "did you mean"]),
        ("select.max_faces=0", ["select.max_faces", "greater than or equal to 1", "0"]),
        ("crops.resolution=100", ["crops.resolution", "multiple of 8"]),
        ("split.by=people", ["split.by", "'person'", "people"]),
        ("identity.regex='['", ["identity.regex", "regular expression"]),
        ("identity.regex=abc", ["identity.regex", "group"]),
        ("select=3", ["select", "3"]),
    ],
)
def test_wrong_setting_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(PrepareConfig, None, [*PATHS, override])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("text", ["select.min_side", "=3", "a..b=1", "a=[1"])
def test_malformed_override_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--set"):
        parse_override(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2", "must hold 'key: value' lines"), (None, "does not exist")],
)
def test_unusable_file_says_why(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=words):
        load_config(PrepareConfig, path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["identity.source=regex"], "identity.regex is empty"),
        (["split.by=regex"], "val_regex"),
        (["split.val=0.6", "split.test=0.4"], "nothing to train on"),
        (["cache.text=true"], "cache.base_model"),
        (["faces.pack=none"], "select.no_face=non_human"),
    ],
)
def test_contradictions_are_found_before_any_work(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_config(load_config(PrepareConfig, None, [*PATHS, *overrides]))


def test_shipped_configurations_are_valid() -> None:
    shipped = sorted((Path(__file__).parents[2] / "training" / "configs").glob("prepare*.yaml"))
    assert len(shipped) >= 3
    for path in shipped:
        check_config(load_config(PrepareConfig, path, PATHS))
