"""`python -m cluster.edge --config FILE`: one router in the foreground."""

from cluster.edge.serve import main

main()
