"""Domain nouns to protobuf messages and back: the one place where the two meet, one module per noun.

Used by `replicas/frames.py` (supervisor and rank 0) and by both ends of the replica link, which speak the
same messages.
"""
