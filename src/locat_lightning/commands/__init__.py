"""What `locat` does: parse, call, print."""
