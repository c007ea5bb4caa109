"""Other engines on the same checkpoint, prompts and threads, each in its own interpreter.

One file per peer holds its adapter: `add` a request, `step` the engine. `driver.py` runs it in the peer's
interpreter and needs nothing but the standard library and that peer.
"""
