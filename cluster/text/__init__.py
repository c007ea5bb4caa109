"""Text to tokens and back: tokenizers, incremental detokenising, stop texts."""
