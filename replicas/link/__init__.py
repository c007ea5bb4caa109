"""The replica's side of the link: dials routers, carries deltas up and commands down."""
