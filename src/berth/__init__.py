"""Linux machines that feel like an extension of your own computer."""
