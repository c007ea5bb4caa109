"""The supervisor of a rank group: lifecycle, dispatch, energy account, metrics."""
