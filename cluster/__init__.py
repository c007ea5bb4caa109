"""The composition: configuration, placement on Ray Serve, router, telemetry, command line."""
