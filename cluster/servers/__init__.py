"""The sockets of a process: gRPC and HTTP, their certificates and their guards."""
