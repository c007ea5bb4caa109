"""Arithmetic leaves: linear shards, attention over pages, rotary embedding, norm, experts."""
