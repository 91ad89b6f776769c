"""The work around the method: stages on Ray, their artifacts, tracking, and the `enat` command."""
