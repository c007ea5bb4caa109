"""OpenAI's HTTP protocol on the router: its requests in, `Streams` at work, its answers out."""
