"""What a run leaves behind: where it is, how it is written and read."""
