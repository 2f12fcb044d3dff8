"""What all other folders build on: errors, options, files, the process and its device."""
