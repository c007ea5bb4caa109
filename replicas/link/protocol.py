"""The version of what is said on a link: a replica names it in its Hello, and a router takes no other."""

PROTOCOL_VERSION = 2
