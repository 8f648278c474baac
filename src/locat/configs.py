"""The shipped configs, by name."""

from pathlib import Path

from locat.errors import Parser


def config_directory() -> Path:
    """Return the directory of the shipped configs: in an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "locat_lightning" / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def names() -> list[str]:
    """Return the names of the shipped configs, in order."""
    directory = config_directory()
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.yaml"))


def find(name: str) -> Path | None:
    """Find a config: a local file first, then a shipped one, whose ending `.yaml` may be left out."""
    shipped = config_directory() / name
    return next((path for path in (Path(name), shipped, Path(f"{shipped}.yaml")) if path.is_file()), None)


def list_configs() -> str:
    """Return a line for each shipped config: its name and its first comment."""
    first_lines = ((config_directory() / name).read_text().splitlines()[0] for name in names())
    return "\n".join(f"{name:28}{line.lstrip('# ')}" for name, line in zip(names(), first_lines, strict=True))


def main(arguments: list[str]) -> None:
    """Run `locat configs`."""
    parser = Parser("locat configs", description="List the configs that --config takes by name.")
    parser.parse_args([each for each in arguments if each != "--debug"][1:])
    print(list_configs())
