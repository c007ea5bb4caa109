"""Joules as the router counts them: per request, per replica, per second."""
