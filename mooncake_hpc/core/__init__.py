"""What everybody may import and what imports nobody: errors, settings, addresses, memory, requests, decoding."""
