"""The header of a run: its whole configuration, what follows from it, and what has changed since the last start."""

from pathlib import Path
from typing import Any

import yaml

from dataio.files import atomic_write
from dataio.options import Options
from dataio.urls import redact_url
from launch.config import Config, dump_config, translate_renamed_keys
from launch.monitor import Monitor
from launch.plan import Plan, describe


def log_run_header(config: Config, plan: Plan, monitor: Monitor, notes: list[str]) -> None:
    """Print the effective configuration and the plan, and what changed since the last start; save config.yaml."""
    text = redact_url(dump_config(config))
    path = config.output / "config.yaml"
    if plan.loader_options.rank == 0:
        if path.is_file():
            notes = [*notes, *diff_with_saved_config(path, text)]
        atomic_write(path, text.encode())
    monitor.text("configuration", text)
    for line in (text, *(f"{name}: {value}" for name, value in describe(config, plan).items()), *notes):
        monitor.log(line)


def diff_with_saved_config(path: Path, text: str) -> list[str]:
    """Return a line for each difference to the configuration of the last start, which may be of an older version."""
    try:
        before = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        before = " ".join(str(error).split())
    if isinstance(before, dict):
        before = translate_renamed_keys(before)
        for name, field in Config.model_fields.items():
            if isinstance(field.default, Options) and isinstance(section := before.get(name, {}), dict):
                before[name] = field.default.model_dump(mode="json") | section  # an older version lacks keys
        return config_diff(before, yaml.safe_load(text))
    return [
        f"{path} held no configuration ({before}); it is rewritten, and what changed since the last start is unknown"
    ]


def config_diff(before: dict[str, Any], now: dict[str, Any], section: str = "") -> list[str]:
    """Return a line for each key whose value differs between the run's last start and now."""
    lines = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += config_diff(old, new, f"{section}{key}.")
        elif old != new:
            lines.append(f"changed since the last start: {section}{key}: {old} → {new}")
    return lines
