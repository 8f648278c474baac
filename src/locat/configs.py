"""The shipped configs, by name."""

from pathlib import Path


def config_directory() -> Path:
    """Where the shipped configs are: inside an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "locat_lightning" / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def list_configs() -> str:
    """A line for each shipped config: its name, and its first comment."""
    lines = []
    for path in sorted(config_directory().rglob("*.yaml")):
        name = path.relative_to(config_directory()).as_posix()
        lines.append(f"{name:28}{path.read_text().splitlines()[0].lstrip('# ')}")
    return "\n".join(lines)
