"""Edge device: engines, noise and the reverse loop on numpy and one engine library. Never torch."""
