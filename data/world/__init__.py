"""The generator of the bundled corpus: a small world that is told, asked about and translated."""
