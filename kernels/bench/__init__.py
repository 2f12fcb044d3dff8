"""The kernels measured beside what one would take instead: `python -m kernels.bench`."""
