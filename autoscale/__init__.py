"""The autoscaling policy's place in the house. Pure: imports neither torch nor Ray."""
