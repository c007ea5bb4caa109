"""How ranks agree: validated degrees, collectives, the plan ring."""
