"""`python -m cluster.ledger --config FILE`: one ledger store in the foreground."""

from cluster.ledger.process import main

main()
