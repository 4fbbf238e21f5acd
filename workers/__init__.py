"""Processes: settings, telemetry, the workers, the Ray Serve app and the fleet CLI."""
