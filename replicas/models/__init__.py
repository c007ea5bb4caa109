"""Model shapes, weights and the decoder that serves Llama, Granite and Granite MoE."""
