"""Who may call, by which key and certificate, and the secrets behind salts and seals."""
