"""What watches a run: probes and pictures."""
