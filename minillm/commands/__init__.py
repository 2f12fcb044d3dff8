"""The commands of `python -m minillm`, one file each."""
