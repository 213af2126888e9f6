"""What `make bench` measures: one module per question, one JSON line per figure."""
