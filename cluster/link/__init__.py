"""The router's side of the replica link: who is attached, and what they were asked."""
