"""The `locat` command: configs by name and runs, without importing torch."""
