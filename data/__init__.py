"""What turns text into token bins, and the bundled corpus."""
