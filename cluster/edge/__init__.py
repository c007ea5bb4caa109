"""The router process put together: every protocol on one event loop."""
