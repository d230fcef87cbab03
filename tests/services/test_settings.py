"""Settings: three sources, one name, and no typo accepted."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from services.settings import Settings, SettingsError, add_flags, read_settings, variables


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(flags)


def test_flags_win_over_the_environment_and_the_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "millrace.toml"
    file.write_text('port = 1\nthreads = 1\nhost = "0.0.0.0"\n')
    environment = {"MILLRACE_CONFIG": str(file), "MILLRACE_PORT": "2", "MILLRACE_THREADS": "2"}
    settings = read_settings(parse("--port", "3"), environment)
    assert (settings.port, settings.threads, settings.host) == (3, 2, "0.0.0.0")


def test_every_field_is_a_flag_and_a_variable() -> None:
    shown = argparse.ArgumentParser()
    add_flags(shown)
    text = shown.format_help()
    for each in fields(Settings):
        assert "--" + each.name.replace("_", "-") in text
        assert "MILLRACE_" + each.name.upper() in variables()


def test_defaults_pass_their_own_bounds() -> None:
    defaults = Settings()
    environment = {"MILLRACE_" + each.name.upper(): str(getattr(defaults, each.name)) for each in fields(Settings)}
    assert read_settings(parse(), environment) == read_settings(parse(), {})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MILLRACE_PROT": "1"}, "unknown environment variable MILLRACE_PROT"),
        ({"MILLRACE_PORT": "eighty"}, "MILLRACE_PORT: 'eighty' is not a value for port; expected a whole number"),
        ({"MILLRACE_PORT": "70000"}, "port is 70000; expected a whole number from 0 to 65535"),
        ({"MILLRACE_TARGET_ITL_MS": "nan"}, "target_itl_ms is nan"),
        ({"MILLRACE_KERNELS": "sse9"}, "expected one of auto, portable, avx2, avx512"),
        ({"MILLRACE_CONFIG": "/no/such/file"}, "cannot read settings from /no/such/file"),
    ],
)
def test_a_bad_value_names_itself_its_source_and_what_was_expected(environment: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(parse(), environment)
    assert words in str(caught.value)


def test_an_unknown_key_of_the_file_refuses_to_start(tmp_path: Path) -> None:
    file = tmp_path / "millrace.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(SettingsError, match="unknown setting 'prot'"):
        read_settings(parse("--config", str(file)), {})
