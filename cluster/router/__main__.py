"""`python -m cluster.router --config FILE`: one router in the foreground."""

from cluster.router.serve import main

main()
