"""What follows `enat` on the command line, one command or group a file."""
