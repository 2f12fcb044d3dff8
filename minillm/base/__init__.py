"""What everything else stands on: errors, options, files, the process and its device."""
