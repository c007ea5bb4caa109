"""What `wattline up` runs: Ray, placement on Ray Serve, the router child, the energy agent."""
