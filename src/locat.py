"""The `locat` command."""
