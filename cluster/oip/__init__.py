"""Open Inference Protocol v2 on the router, with Triton's streaming and the tensors of its vLLM backend."""
