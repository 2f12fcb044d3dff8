"""How files of texts and of rows are read, in whatever format and encoding they are."""
