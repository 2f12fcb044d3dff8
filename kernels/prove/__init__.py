"""All that has to be shown on a GPU, in one command with a time limit: `python -m kernels.prove`."""
